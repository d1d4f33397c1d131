"""Whatever waits for its programs while others decode: no result changes, for any kind of cache, input and request."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from support import cross, images
from support.beams import beam_request, found
from support.cases import SEEDED, poison
from support.compiling import go_on
from support.tiny import BLOCK, CHUNK, hybrid_runner, make_engine, make_request, prompt, random_runner

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.wanted import Kept, Wanted
from jaxinfer.functional.taps import LAST
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.steering import Steering

LONG = SamplingParams(temperature=0, max_tokens=40)
SAMPLES = SamplingParams(temperature=0.3, seed=11, max_tokens=8, n=3)
SHARED = prompt(3 * BLOCK, 70)
STEERING = Steering({"layers.0": np.linspace(-1, 1, 32)}, scale=2.0)


def result(request: Request) -> Any:
    """Everything that a request returns."""
    if request.beams is not None:
        return found(request)
    if request.wanted is not None:
        return request.wanted.captures.arrays()[LAST].round(4).tolist()
    return [s.output_ids.tolist() for s in request.sequences]


def texts() -> list[Request]:
    """A prefix that a running request has computed, samples, and prompts of several chunks."""
    return [
        make_request("found", [*SHARED, *prompt(3, 5)], SEEDED),
        make_request("samples", prompt(CHUNK + 2, 6), SAMPLES),
        make_request("chunks", prompt(2 * CHUNK + 3, 7), SEEDED),
    ]


def running() -> list[Request]:
    return [make_request("a", [*SHARED, *prompt(2, 1)], LONG), make_request("b", prompt(5, 2), LONG)]


def hidden() -> list[Request]:
    """Requests that end with their prefill."""
    made = []
    for i, length in enumerate((5, CHUNK + 3)):
        ids = prompt(length, 30 + i)
        own = SamplingParams(temperature=0, max_tokens=1)
        made.append(make_request(f"hidden {i}", ids, own, wanted=Wanted(0, (LAST,), Kept())))
        made[-1].limit = length
    return made


def searches(new: int = 9) -> list[Request]:
    lengths = 5, CHUNK + 3
    return [beam_request(f"beams {i}", prompt(n, 9 + i), new, (7, 30), width=3) for i, n in enumerate(lengths)]


def steered() -> list[Request]:
    own = dict(steering=STEERING, salt=STEERING.digest)
    return [make_request(f"steered {i}", prompt(9 + i, 40 + i), SEEDED, **own) for i in range(2)]


A, B = images.image(1, 1), images.image(3, 2)


def shown(params: SamplingParams = SEEDED, first: int = 0) -> list[Request]:
    """One image of the running request, a new one twice, in chunks that cut it, and none."""
    parts = ((5, A, 3), (4, B, 9, A), (B, 2), (6,))
    return [
        images.image_request(f"{first}, {i}", part, params, seed=40 * (first + i))
        for i, part in enumerate(parts[:1] if first else parts)
    ]


def read(params: SamplingParams = SEEDED, first: int = 0) -> list[Request]:
    """One text of the running request, a new one twice."""
    lengths = (17,) if first else (17, 33, 33)
    return [
        cross.cross_request(f"{first}, {i}", cross.text(length, length), params, [cross.START, *prompt(i, first + i)])
        for i, length in enumerate(lengths)
    ]


@dataclass(frozen=True)
class Case:
    """Requests that run, and others that come to an engine whose programs for them are missing."""

    runner: Callable[[], Runner] = random_runner
    running: Callable[[], list[Request]] = running
    late: Callable[[], list[Request]] = texts
    host: dict[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case(),
    "llama, no room": Case(host=dict(pool_blocks=24, budget=9)),
    "llama, nothing cached": Case(host=dict(prefix_caching=False, budget=9)),
    "llama, hidden": Case(late=hidden, host=dict(budget=9)),
    "llama, beams": Case(late=searches),
    "llama, beams run": Case(running=lambda: searches(40)),
    "llama, steering": Case(late=steered),
    "llama, steered run": Case(running=lambda: [*running(), *steered()]),
    "kimi_linear": Case(lambda: random_runner("kimi_linear"), host=dict(budget=9)),
    "qwen3_next": Case(lambda: random_runner("qwen3_next"), host=dict(budget=9)),
    "five to one": Case(lambda: hybrid_runner("five to one"), host=dict(budget=9)),
    "internvl": Case(images.image_runner, lambda: shown(LONG, 1), shown),
    "internvl, in chunks": Case(images.image_runner, lambda: shown(LONG, 1), shown, dict(budget=7)),
    "internvl, deterministic": Case(images.deterministic_runner, lambda: shown(LONG, 1), shown),
    "cross": Case(cross.cross_runner, lambda: read(LONG, 1), read),
    "cross, in chunks": Case(cross.cross_runner, lambda: read(LONG, 1), read, dict(budget=3)),
}
DEFAULT = ("llama", "llama, hidden", "cross")


def run(engine: Engine, requests: list[Request]) -> list[Any]:
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    return [result(request) for request in requests]


def group(name: str) -> Any:
    marks = [pytest.mark.xdist_group(name.split(",")[0])]
    return pytest.param(name, marks=marks if name in DEFAULT else [*marks, pytest.mark.slow])


@pytest.mark.parametrize("name", [group(name) for name in CASES])
def test_what_waits_for_programs_changes_no_result(name: str, monkeypatch: pytest.MonkeyPatch):
    case = CASES[name]
    runner = case.runner()
    expected = [run(make_engine(runner, prefix_caching=False), [one])[0] for one in [*case.running(), *case.late()]]
    assert len({str(one) for one in expected}) == len(expected), "all results must differ, or the test cannot fail"
    engine = make_engine(runner, **case.host)
    poison(runner)
    first, late = case.running(), case.late()
    assert go_on(engine, monkeypatch, first, late, rounds=4) > 0
    assert [result(request) for request in [*first, *late]] == expected
    assert all(s.finish_reason != "error" for request in [*first, *late] for s in request.sequences)
    assert engine.scheduler.preempted == 0 or "pool_blocks" in case.host
