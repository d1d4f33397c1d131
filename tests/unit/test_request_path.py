"""The path of a request in docs/architecture.md is the one that a call takes."""

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from support import checkpoint

import jaxinfer
from jaxinfer import LLM, SamplingParams

PACKAGE = Path(jaxinfer.__file__).parent
TABLE = PACKAGE.parent / "docs/architecture.md"
ROW = re.compile(r"^\| (\d+) \| (.*?) \| `(.*?)` \|", re.MULTILINE)
TRACED = range(10, 17)
"""Rows of functions that run while a step is compiled."""


@contextmanager
def recorded_calls() -> Iterator[dict[tuple[str, str], int]]:
    """Record when each function of the package was first called, on all threads that start meanwhile."""
    first: dict[tuple[str, str], int] = {}

    def note(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            first.setdefault((str(Path(code.co_filename).relative_to(PACKAGE)), code.co_qualname), len(first))

    before = sys.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield first
    finally:
        sys.setprofile(before)
        threading.setprofile(None)


@pytest.mark.slow
def test_a_request_makes_the_calls_of_the_table_in_their_order(tmp_path):
    rows = {
        int(number): (re.findall(r"`(.*?)`", names), file) for number, names, file in ROW.findall(TABLE.read_text())
    }
    assert list(rows) == list(range(1, len(rows) + 1)) and 15 < len(rows) <= 20
    folder = checkpoint.write(tmp_path, {"hidden_size": 24})
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, stop=["a text that never comes"])
    with recorded_calls() as first, LLM(folder, max_num_seqs=2, max_model_len=64) as llm:
        llm.generate("hello world", params)
        compiling = dict(first)
        first.clear()
        [output] = llm.generate("hello world", params)
    assert len(output.outputs[0].token_ids) == 3
    for numbers, calls in ((TRACED, compiling), ([number for number in rows if number not in TRACED], first)):
        when = {}
        for number in numbers:
            names, file = rows[number]
            missing = [name for name in names if (file, name) not in calls]
            assert not missing, f"row {number}: {missing} of {file} not called"
            when[number] = min(calls[file, name] for name in names)
        assert sorted(numbers, key=when.__getitem__) == list(numbers)
