"""Two processes of two virtual devices each serve one model, over gloo."""

import contextlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import checkpoint, processes, worker
from support.processes import Process

from jaxinfer import LLM

pytestmark = pytest.mark.xdist_group("distributed")
Serve = Callable[..., list[Process]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    return checkpoint.write(tmp_path_factory.mktemp("model"), dict(num_key_value_heads=4), with_tokenizer=False)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`processes.serve`; whatever is left of them is ended after the test."""
    started: list[Process] = []

    def start(models: Sequence[Path], acts: Sequence[str] = ("", ""), **more: float) -> list[Process]:
        started.extend(processes.serve(models, acts, **more))
        return started

    yield start
    processes.end(started)


def in_this_process(model: Path, change: Callable[[jax.Array], jax.Array] | None = None) -> list[list[list[int]]]:
    """Return the tokens of one process and device; `change` is applied to each weight before."""
    settings = processes.SETTINGS | {"tensor_parallel_size": 1}
    with LLM(model, skip_tokenizer_init=True, use_tqdm=False, **settings) as llm:
        if change is not None:
            llm.update_weights({name: change(array) for name, array in llm.weights().items()})
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in worker.PROMPTS]
        outputs = llm.generate(prompts, worker.requests(), use_tqdm=False)
        return [[list(c.token_ids) for c in output.outputs] for output in outputs]


@pytest.mark.slow
def test_another_model_in_one_process_is_an_error_that_names_it_in_both(serve, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file(
        weights | {"model.norm.weight": weights["model.norm.weight"] * np.float32(2)}, other / "model.safetensors"
    )
    for process in serve([model, other]):
        assert process.wait() == 1, process.stderr
        assert "DistributedError: process 1 differs from process 0 in its model's tensors" in process.stderr


@pytest.mark.slow
def test_tokens_are_those_of_one_process_and_one_device(serve, model):
    first, second = serve([model, model])
    assert [first.wait(), second.wait()] == [0, 0], first.stderr + second.stderr
    assert first.said()["tokens"] == in_this_process(model)
    assert max(first.said()["cached"]) > 0  # blocks of the first call serve the second one
    assert second.said() == {"ended": 1}


@pytest.mark.slow
@pytest.mark.parametrize("dead", [1, 0])
def test_a_killed_process_ends_the_other_in_time_with_an_error_that_names_it(serve, model, dead):
    pair = serve([model, model], ["long", ""], timeout=60)
    pair[0].wait_for("RUNNING")
    time.sleep(0.5)
    started = time.monotonic()
    pair[dead].popen.kill()
    status = pair[1 - dead].wait()
    # Where process 0 is gone JAX's own service is too, and JAX aborts: after the reason has been said.
    assert status == 1 if dead else status in (1, -signal.SIGABRT)
    assert time.monotonic() - started < 120
    assert f"jaxinfer: process {1 - dead} ends: process {dead} (127.0.0.1" in pair[1 - dead].stderr
    assert "has died" in pair[1 - dead].stderr


@pytest.mark.slow
def test_a_process_that_hangs_ends_all_of_them(serve, model):
    first, second = serve([model, model], ["long", ""], timeout=20)
    first.wait_for("RUNNING")
    started = time.monotonic()
    second.popen.send_signal(signal.SIGSTOP)
    try:
        assert first.wait() == 1
        assert time.monotonic() - started < 120  # the machine has other work
    finally:
        second.popen.send_signal(signal.SIGCONT)
    assert "jaxinfer: process 0 ends: process 1 (127.0.0.1" in first.stderr
    assert "has sent no heartbeat for" in first.stderr
    assert second.wait() != 0


@pytest.mark.slow
def test_a_process_that_computes_something_else_is_found_and_named(serve, model):
    for process in serve([model, model], ["", "change"]):
        assert process.wait() in (1, -signal.SIGABRT), process.stderr
        assert "process 1 has diverged from process 0: launch" in process.stderr


@pytest.mark.slow
def test_an_interrupt_of_process_0_ends_the_other_in_order(serve, model):
    first, second = serve([model, model], ["long", ""])
    first.wait_for("RUNNING")
    time.sleep(1)
    while first.popen.poll() is None:  # again, as Python drops one that falls into a callback of the garbage collector
        first.popen.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            first.popen.wait(60)
    assert [first.wait(), second.wait()] == [0, 0], first.stderr + second.stderr
    assert first.said()["interrupted"] and second.said() == {"ended": 1}


@pytest.mark.slow
def test_warming_up_is_done_by_all_and_what_cannot_be_is_refused_by_name(serve, model):
    """In between requests are paused for longer than the timeout, and both processes free their caches, twice."""
    first, second = serve([model, model], ["warm", "generate"], timeout=20)
    assert [first.wait(), second.wait()] == [0, 0], first.stderr + second.stderr
    assert first.said()["free"] == second.said()["free"] == 5 << 30  # the least of all decides
    refused = first.said()["refused"]
    names = [message.split(": ")[:2] for message in refused]
    assert names == [["DistributedError", method] for method in ("update_weights", "weights", "module")]
    assert first.said()["freed"] and second.said()["freed"]
    assert first.said()["tokens"] == in_this_process(model)
    assert "this is process 1" in second.said()["refused"] and "llm.follow()" in second.said()["refused"]


@pytest.mark.slow
def test_weights_are_changed_in_all_processes_between_two_generations(serve, model):
    """Wrong weights in one process are an error in both, after which the old ones stand; sleep drops and gets them."""
    first, second = serve([model, model], ["train", "train"])
    assert [first.wait(), second.wait()] == [0, 0], first.stderr + second.stderr
    before, changed, again = first.said()["trained"]
    assert before == again == in_this_process(model) != changed
    assert changed == in_this_process(model, worker.changed_weight)
    in_use, missing, differ, infinite, some, *rest = first.said()["refused"]
    assert in_use.startswith("DistributedError: weights:") and "call release_followers()" in in_use
    assert missing.startswith("CheckpointError: process 1: the update lacks 1") and "model.norm.weight" in missing
    assert differ.startswith("DistributedError: update_weights: process 1 differs from process 0 in the values")
    assert "expected finite values" in infinite and "lacks" in some and rest == [in_use, in_use]
    others = second.said()["refused"]
    assert others[0].startswith("CheckpointError: the update lacks 1") and others[1:3] == [differ, infinite]
    assert others[3].startswith("CheckpointError: process 0: the update lacks")


@pytest.mark.slow
def test_a_process_that_does_not_follow_is_named(serve, model):
    first, second = serve([model, model], ["", "leave"])
    assert first.wait() == 1 and second.wait() == 0
    assert "process 1 ended before process 0; it has to call llm.follow()" in first.stderr


@pytest.mark.slow
def test_the_command_line_on_two_processes(model):
    checkpoint.tokenizer().save_pretrained(model)
    command = [
        "scripts/generate.py",
        "--model",
        str(model),
        "--prompt",
        "the cat",
        "--max-tokens",
        "8",
        "--json",
        "--max-model-len",
        "64",
    ]
    together = ["--coordinator", f"127.0.0.1:{processes.free_port()}", "--num-processes", "2"]
    started = processes.start(
        [
            [*command, *together, "--process-id", "0"],
            [*command, *together, "--process-id", "1"],
            command,
        ]
    )
    try:
        assert [process.wait() for process in started] == [0, 0, 0], started[0].stderr + started[1].stderr
        rows = [[json.loads(line) for line in process.out if line.startswith("{")] for process in started]
        assert rows[0] == rows[2] and len(rows[0]) == 1 and rows[1] == []
    finally:
        processes.end(started)
