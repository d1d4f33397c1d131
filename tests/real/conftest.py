"""Real, trained checkpoints (`make.py`): one LLM and one reference for each dtype, shared by all tests of a model."""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxinfer import LLM

FOLDER = os.environ.get("JAXINFER_REAL_MODELS")
WORKSHOP = Path(__file__).parent / "data" / "workshop.txt"
SETTINGS = dict(
    max_model_len=3328,
    max_num_seqs=8,
    max_num_batched_tokens=1024,
    prefill_buckets=(256, 1024),
    decode_buckets=(8,),
    kv_cache_memory_bytes=1 << 29,
    max_logprobs=5,
    use_tqdm=False,
)


class RealModel:
    """A checkpoint, here and in transformers. What is not needed any more is dropped by `forget`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._llms: dict[str, LLM] = {}
        self._references: dict[str, Any] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """That of transformers."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def workshop(self) -> list[int]:
        """The tokens of a text of 18 kB."""
        return self.tokenizer(WORKSHOP.read_text(encoding="utf-8"), add_special_tokens=False).input_ids

    def llm(self, dtype: str = "float32") -> LLM:
        """The checkpoint here; "int8" is a dtype for this purpose, and "float32/fp8" one with a quantised cache."""
        if dtype not in self._llms:
            kind, _, codes = dtype.partition("/")
            own = dict(dtype="bfloat16", quantization="int8") if kind == "int8" else dict(dtype=kind)
            own |= dict(kv_cache_dtype=codes or "auto")
            self._llms[dtype] = LLM(str(self.folder), **SETTINGS | own)
        return self._llms[dtype]

    def reference(self, dtype: str = "float32") -> Any:
        """The checkpoint in transformers."""
        import torch
        from transformers import AutoModelForCausalLM

        if dtype not in self._references:
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=getattr(torch, dtype))
            self._references[dtype] = model.eval()
        return self._references[dtype]

    def reference_logprobs(self, ids: list[int], last: int, dtype: str = "float32") -> np.ndarray:
        """`[last, V]` transformers' log-probabilities of what follows each of the last tokens but one, the final one's
        left out."""
        import torch

        with torch.no_grad():
            logits = self.reference(dtype)(torch.tensor([ids[:-1]]), use_cache=False, logits_to_keep=last).logits[0]
        return torch.log_softmax(logits.float(), -1).numpy()

    def reference_scores(self, ids: list[int], dtype: str = "float32") -> np.ndarray:
        """`[len(ids) - 1]` transformers' log-probability of each token but the first."""
        import torch

        with torch.no_grad():
            states = self.reference(dtype).model(torch.tensor([ids[:-1]]), use_cache=False).last_hidden_state[0]
            found = []
            for some, targets in zip(states.split(128), torch.tensor(ids[1:]).split(128), strict=True):
                logits = self.reference(dtype).lm_head(some).float()
                found.append(logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1))
        return torch.cat(found).numpy()

    def forget(self, *dtypes: str) -> None:
        """Close the LLMs and drop the references of these dtypes."""
        for dtype in dtypes:
            self._references.pop(dtype, None)
            if dtype in self._llms:
                self._llms.pop(dtype).close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test that asks for `model` both checkpoints, or those named by its mark `only`."""
    if "model" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("only")
        names = marker.args if marker else ("SmolLM2-135M-Instruct", "gemma-3-270m")
        marked = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]
        metafunc.parametrize("model", marked, indirect=True, scope="session")


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest) -> Iterator[RealModel]:
    """A real checkpoint; without JAXINFER_REAL_MODELS the test is skipped, and fails where that names no such
    folder."""
    if FOLDER is None:
        pytest.skip("JAXINFER_REAL_MODELS names no folder of real checkpoints (tests/real/make.py makes one)")
    folder = Path(FOLDER) / request.param
    assert (folder / "config.json").is_file(), (
        f"JAXINFER_REAL_MODELS={FOLDER} has no {request.param}; run tests/real/make.py"
    )
    made = RealModel(folder)
    yield made
    made.forget("float32", "bfloat16", "int8")
