"""Warm-up: afterwards no request compiles anything."""

import threading
from concurrent.futures import wait
from functools import cache

import jax
import numpy as np
import pytest
from support.stepping import PATIENCE, wait_until
from support.tiny import CHUNK, ROWS, make_engine, make_request, prompt, random_runner, shapes

from jaxinfer.engine.runner.buckets import SAMPLING
from jaxinfer.engine.runner.keys import Copies
from jaxinfer.engine.runner.programs import Programs
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.runner.warmup import check_sampling, warm_up
from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("llama")

REQUESTS = 70
KINDS = (
    dict(temperature=0),
    dict(temperature=0.9),
    dict(temperature=0.9, min_p=0.1),
    dict(temperature=0.9, top_k=5),
    dict(temperature=0.9, top_p=0.8),
    dict(temperature=0, repetition_penalty=1.3),
    dict(presence_penalty=0.5),
    dict(temperature=0, logit_bias={5: 3.0}),
    dict(allowed_token_ids=[4, 5, 6]),
    dict(temperature=0, logprobs=3),
    dict(prompt_logprobs=2),
    dict(temperature=0.7, top_k=3, logprobs=0, prompt_logprobs=5),
)
"""Sampling parameters of requests: every sampler level, with and without log-probabilities."""


@cache
def warm_runner() -> Runner:
    """A runner over the shared model with its own buckets, all compiled."""
    model = random_runner()
    sizes = shapes(decode_buckets=(2, ROWS), prefill_buckets=(CHUNK // 2, CHUNK), switched=True)
    runner = Runner(model.program, model.params, sizes)
    done = warm_up(runner.prepare(SAMPLING), SAMPLING, threads=2, use_tqdm=False)
    assert done.programs == done.compiled == len(runner.programs.seconds) == 2 + 2 + 2 + 2
    return runner


@pytest.fixture
def compilations() -> list[str]:
    """Names of programs compiled from here on; programs read from JAX's cache are counted, too."""
    found: list[str] = []

    def listen(name: str, _seconds: float, **labels: object) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            found.append(str(labels))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def random_request(number: int, rng: np.random.Generator):
    """A request of any kind, often with several samples and a shared prefix."""
    kind = KINDS[number % len(KINDS)]
    count = 1 if kind.get("temperature") == 0 else int(rng.choice([1, 2, 4]))
    params = SamplingParams(**kind, n=count, max_tokens=int(rng.integers(1, 30)), seed=number)
    ids = prompt(40, int(rng.integers(3)))[: int(rng.integers(1, 40))]
    return make_request(str(number), ids, params)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_random_workload_compiles_nothing_after_warm_up(compilations, seed):
    runner, rng = warm_runner(), np.random.default_rng(seed)
    compilations.clear()
    engine = make_engine(runner, pool_blocks=24)
    copies = aborted = added = 0
    failed = False
    schedule = engine.scheduler.schedule

    def watched(most):
        nonlocal copies
        plan = schedule(most)
        copies += len(plan.copies[0])
        return plan

    engine.scheduler.schedule = watched
    while added < REQUESTS or engine.has_work:
        if added < REQUESTS and rng.random() < 0.4:
            engine.add(random_request(added, rng))
            added += 1
        if engine.requests and rng.random() < 0.03:
            engine.abort(str(rng.choice(list(engine.requests))))
            aborted += 1
        if added == REQUESTS // 2 and not failed:
            failed = True
            engine.recovery.recover(RuntimeError("a step failed"))
        engine.step()
    assert compilations == []
    assert copies and aborted and engine.scheduler.preempted, "the workload must cause copies, aborts and preemptions"
    assert 0 < runner.padding < runner.places


@pytest.mark.slow
def test_the_counter_sees_a_program_that_was_not_compiled_ahead(compilations):
    runner = warm_runner()
    compilations.clear()
    cold = Programs(runner.program, runner.shapes, runner.params)
    cold.get(Copies(3))
    assert len(compilations) == 1


@pytest.mark.slow
def test_a_second_warm_up_has_nothing_to_do():
    runner = warm_runner()
    done = warm_up(runner.programs, SAMPLING, use_tqdm=False)
    assert (done.compiled, done.programs) == (0, len(runner.programs.keys()))
    assert str(done).startswith("0 programs compiled")


class Slow(Programs):
    """Programs whose compilation takes a while and returns a number, or fails."""

    def __init__(self, fails: int = 0):
        runner = random_runner()
        super().__init__(runner.program, runner.shapes, runner.params)
        self.calls, self.fails, self.free = 0, fails, threading.Event()
        self.claims: list[object] = []
        """What each thread has asked for."""

    def _claim(self, key):
        found = super()._claim(key)
        self.claims.append(key)
        return found

    def lower(self, key):
        self.calls += 1
        number = self.calls
        assert self.free.wait(PATIENCE)
        if number <= self.fails:
            raise RuntimeError("no kernel for this shape")
        return jax.jit(lambda: number).lower()


def ask(programs: Programs, threads: int) -> list[object]:
    """Results of this many threads that ask for a program at the same time."""
    answers: list[object] = []

    def get() -> None:
        try:
            answers.append(programs.get(Copies(1)))
        except RuntimeError as error:
            answers.append(str(error))

    asking = [threading.Thread(target=get) for _ in range(threads)]
    for thread in asking:
        thread.start()
    wait_until(lambda: len(programs.claims) == threads)
    programs.free.set()
    for thread in asking:
        thread.join(PATIENCE)
    return answers


def test_threads_that_ask_for_one_program_compile_it_once():
    programs = Slow()
    answers = ask(programs, 4)
    assert programs.calls == 1
    assert len(answers) == 4 and len(set(map(id, answers))) == 1
    assert int(answers[0]()) == 1


def test_a_failed_compilation_raises_in_all_waiting_threads_and_is_retried():
    programs = Slow(fails=1)
    assert ask(programs, 3) == ["no kernel for this shape"] * 3
    assert int(programs.get(Copies(1))()) == 2
    assert programs.calls == 2 and list(programs.seconds) == [Copies(1)]


@pytest.mark.parametrize("fails", [0, 1])
def test_a_program_is_compiled_on_a_thread_of_its_own(fails):
    """It is begun once, whoever asks for it, and the thread ends with it."""
    programs, told = Slow(fails), threading.Event()
    first, second = (programs.start(Copies(1), told.set) for _ in range(2))
    wait_until(lambda: programs.calls)
    assert first is second and not told.is_set() and programs.calls == 1
    programs.free.set()
    assert told.wait(PATIENCE)
    if fails:
        assert str(first.exception()) == "no kernel for this shape"
        assert int(programs.get(Copies(1))()) == 2, "the next use begins another compilation"
    assert programs.start(Copies(1), told.set) is None
    for thread in threading.enumerate():
        if thread.name.startswith("jaxinfer compile"):
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_a_failure_ends_a_warm_up(monkeypatch):
    """The failing thread begins no other compilation, even if the waiting thread hears of the failure last."""

    def hears_last(futures):
        wait(futures)
        return futures

    monkeypatch.setattr("jaxinfer.engine.runner.programs.as_completed", hears_last)
    programs = Slow(fails=1)
    programs.free.set()
    with pytest.raises(RuntimeError, match="no kernel"):
        warm_up(programs, SAMPLING, threads=1, use_tqdm=False)
    assert programs.calls == 1, "compilations not begun are skipped"


def test_unknown_sampling_names_are_refused():
    assert check_sampling("greedy") == ("greedy",)
    with pytest.raises(ValueError, match="sampling may name greedy, random, .*; got 'beam'"):
        check_sampling(["greedy", "beam"])
