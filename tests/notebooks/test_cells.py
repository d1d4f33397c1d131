"""Cells that run twice, are interrupted, or drop the engine: they behave, and memory comes back."""

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("notebooks")]

SETUP = """
import gc, signal, threading
import jax
from jaxinfer import LLM, SamplingParams, demo
SETTINGS = dict(block_size=8, pool_blocks=48, max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64,
                decode_buckets=(8,), prefill_buckets=(64,), decode_steps=1, kv_cache_memory_bytes=1 << 20,
                use_tqdm=False)
LONG = SamplingParams(max_tokens=200, ignore_eos=True)
def used():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())
"""
MAKE = """
llm = LLM(demo.path(), **SETTINGS)
llm.start_recording()
llm.generate("Question: What is 17 plus 25?\\nAnswer:", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
"""
PICTURES = "axes = llm.plot_blocks(), llm.plot_timeline(); llm.cache"
INTERRUPT = """
came = threading.Event()
def interrupt(seconds=0.4):  # again, as Python drops an interrupt that falls into a callback of the garbage collector
    while not came.wait(seconds):
        signal.raise_signal(signal.SIGINT)
        seconds = 20
threading.Thread(target=interrupt).start()
try:
    while True:
        llm.generate(["Hello"] * 12, LONG, use_tqdm=False)
finally:
    came.set()
"""


@pytest.fixture(scope="module")
def run():
    """Run a cell in one kernel; returns what it shows, or the name of its error."""
    book = nbformat.v4.new_notebook()
    client = NotebookClient(book, timeout=300, kernel_name="python3", allow_errors=True)
    with client.setup_kernel():

        def run_cell(source: str) -> str:
            book.cells.append(nbformat.v4.new_code_cell(source))
            outputs = client.execute_cell(book.cells[-1], len(book.cells) - 1).outputs
            return " ".join(one.get("ename") or str(one.get("text") or one.get("data", {})) for one in outputs)

        assert run_cell(SETUP) == ""
        yield run_cell


def number(shown: str) -> int:
    return int(shown.strip().split()[-1])


def test_cells_that_run_twice_take_no_more_memory(run):
    assert "Error" not in run(MAKE)
    once = number(run("print(used())"))
    assert once > 4 << 20, "weights and a cache are there"
    assert "Error" not in run(MAKE)
    assert number(run("print(used())")) == once, "the LLM of the first run is gone"
    for _ in range(2):
        shown = run(PICTURES)
        assert shown.count("image/png") == 2 and "CacheState" in shown


def test_an_interrupted_cell_frees_its_blocks_and_the_next_one_runs(run):
    before = number(run("print(used())"))
    assert run(INTERRUPT) == "KeyboardInterrupt"
    assert "OK 0" in run("""
llm.generate("Hello", SamplingParams(max_tokens=4), use_tqdm=False)
print("OK", llm.cache.counts["one owner"] + llm.cache.counts["shared"], llm._engine.scheduler.rows.num_used)
""")
    assert number(run("print(used())")) == before


def test_a_deleted_engine_gives_its_memory_back_and_its_pictures_stay(run):
    assert "Error" not in run("recording = llm.stop_recording(); llm")  # IPython keeps what it has shown
    assert "closed" in run("llm.close(); print(llm)")
    assert number(run("print(used())")) < 1 << 16
    assert run("llm.plot_blocks()") == "EngineClosedError"
    assert run("axes = recording.plot_blocks()").count("image/png") == 1
    assert run("del llm; llm.plot_blocks()") == "NameError"
    assert run("axes = recording.plot_timeline()").count("image/png") == 1
