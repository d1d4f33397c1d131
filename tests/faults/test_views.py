"""What a notebook shows of an LLM: also in cells that run twice, are interrupted, or after the LLM is closed."""

import pickle
import re
import signal
import threading
import time

import pytest

from jaxinfer import SamplingParams
from jaxinfer.errors import EngineClosedError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SHORT = dict(use_tqdm=False)
HOSTILE = 'hello <script>alert(1)</script> & "cat"'


def test_outputs_are_a_list_that_shows_itself(llm):
    found = llm.generate(["hello", HOSTILE, "cat"], GREEDY, **SHORT)
    assert isinstance(found, list) and found == list(found) and [*found] == found and len(found + [1]) == 4
    assert found[0].outputs[0].text == list(found)[0].outputs[0].text
    assert pickle.loads(pickle.dumps(found)) == found
    lines = repr(found).splitlines()
    assert lines[0] == "3 outputs" and lines[1].startswith("[0] 'hello' -> ") and len(lines) == 4
    assert "<script>" not in found._repr_html_() and "&lt;script&gt;" in found._repr_html_()
    assert repr(found[:2]).startswith("2 outputs") and repr(found[:0]) == "0 outputs"
    many = type(found)(found * 20)
    assert "and 40 more" in repr(many) and "and 40 more outputs" in many._repr_html_()


def test_an_llm_shows_itself_while_open_and_closed(make_llm):
    with make_llm() as llm:
        shown = repr(llm)
        assert re.search(r"ready engine, 1 device, float32 weights, \d+ blocks of 4 tokens, paged cache", shown), shown
        assert "blocks of 4 tokens" in llm._repr_html_() and "weights" in llm._repr_html_()
        assert "weights" in repr(llm.memory) and llm.memory.total == sum(llm.memory.parts.values())
        llm.pause()
        assert "paused engine" in repr(llm)
        llm.resume()
    assert repr(llm).endswith(", closed)") and "closed" in llm._repr_html_()
    for view in ("cache", "memory", "recording", "timeline"):
        with pytest.raises(EngineClosedError):
            getattr(llm, view)


def test_a_recording_of_cells_that_run_twice(llm):
    vars(llm).pop("_recorded", None)  # of an earlier test
    with pytest.raises(RuntimeError, match=r"call llm.start_recording\(\) before the requests"):
        llm.plot_blocks()
    for _ in range(2):
        llm.start_recording()
        llm.generate("hello", GREEDY, **SHORT)
        assert len(llm.recording.owners) == 1, "starting again drops what was recorded"
    stopped = [llm.stop_recording(), llm.stop_recording()]
    assert stopped[0] is stopped[1] is llm.recording and llm._engine.recorder is None
    llm.generate("cat", GREEDY, **SHORT)
    assert len(llm.timeline.rows) == 1, "nothing is recorded after the stop"
    for steps in (0, True):
        with pytest.raises(ValueError, match="max_steps must be a positive integer"):
            llm.start_recording(max_steps=steps)


def test_pictures_of_a_recording_are_drawn_without_the_engine(make_llm):
    plt = pytest.importorskip("matplotlib.pyplot")
    with plt.rc_context({"backend": "agg"}):
        with make_llm() as llm:
            llm.start_recording()
            params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=8, ignore_eos=True)
            llm.generate("hello cat hello", params, **SHORT)
            found = llm.stop_recording()
        del llm
        blocks, timeline = found.plot_blocks(), found.plot_timeline()
        assert [text.get_text() for text in blocks.texts if "fork" in text.get_text()] == ["fork x2"]
        names = [text.get_text() for text in blocks.get_legend().get_texts()]
        assert names[:3] == ["free", "cached", "shared"] and len(names) == 6
        assert [label.get_text()[-2:] for label in timeline.get_yticklabels()] == ["#0", "#1", "#2"]
        given = plt.figure().add_subplot()
        assert found.plot_blocks(given) is given
        plt.close("all")


def test_an_interrupted_call_leaves_a_recording_that_goes_on(llm):
    llm.start_recording()
    # Tests started in the background of a shell inherit an ignored SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    came, deadline = threading.Event(), time.monotonic() + 300

    def interrupt():
        # Python drops an interrupt that falls into a callback of the garbage collector, and hypothesis has one. So the
        # key is pressed again until the call has ended.
        signalled = came.wait(0.3)
        while not signalled:
            signal.raise_signal(signal.SIGINT)
            signalled = came.wait(20)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            while time.monotonic() < deadline:
                llm.generate("hello", SamplingParams(max_tokens=100, ignore_eos=True), **SHORT)
    finally:
        came.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
    llm.generate("cat", GREEDY, **SHORT)
    reasons = [row.owner.finish_reason for row in llm.timeline.rows]
    assert reasons[-1] == "length" and all(reasons), "the interrupted request has ended too"
    assert (llm.stop_recording().blocks(1) <= 0).all(), "and holds no block"
