"""Steering: vectors are added to the outputs of modules for the tokens of their requests alone."""

import numpy as np
import pytest
from support.cases import poison
from support.tiny import BLOCK, CHUNK, CONFIG, make_engine, make_request, prompt, random_runner

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner import steered
from jaxinfer.engine.wanted import Kept, Wanted
from jaxinfer.errors import ConfigError
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.steering import Steering

WIDTH = CONFIG["hidden_size"]
UP = Steering({"layers.0": np.linspace(-1, 1, WIDTH)}, scale=2.0)
OTHER = Steering({"model.layers.0": np.full(WIDTH, 0.5), "layers.1.mlp": np.arange(WIDTH) % 3})
EACH = (None, UP, OTHER, None, UP)
PREFIX = prompt(3 * BLOCK, 8)


def request(name: str, steering: Steering | None, **fields: object) -> Request:
    own = fields | ({} if steering is None else {"steering": steering, "salt": steering.digest})
    params = SamplingParams(temperature=0, max_tokens=9)
    return make_request(name, PREFIX + prompt(5, 3), params, **own)


def run(engine: Engine, wanted: list[Request]) -> list[list[int]]:
    for one in wanted:
        engine.add(one)
    while engine.has_work:
        engine.step()
    return [one.sequences[0].output_ids.tolist() for one in wanted]


def test_each_request_has_its_own_vectors():
    """In a batch of differently steered requests, in chunks, after preemptions, and with cached prefixes."""
    runner = random_runner()
    alone = [run(make_engine(runner), [request("a", steering)])[0] for steering in EACH]
    assert alone[0] == alone[3] and alone[1] == alone[4] and len({tuple(one) for one in alone}) == 3
    for settings in (dict(), dict(budget=5), dict(pool_blocks=12), dict(decode_steps=4)):
        engine = make_engine(runner, **settings)
        poison(runner)
        for _ in range(2):
            wanted = [request(str(i), steering) for i, steering in enumerate(EACH)]
            assert run(engine, wanted) == alone
        assert (engine.scheduler.preempted > 0) == ("pool_blocks" in settings)
        if not settings:
            assert all(one.cached_tokens >= len(PREFIX) for one in wanted)  # of requests with the same vectors


def states(steering: Steering | None, path: str) -> np.ndarray:
    kept, ids = Kept(), prompt(CHUNK + 3, 1)
    own = {} if steering is None else {"steering": steering}
    wanted = Wanted(0, (path,), kept)
    one = make_request("s", ids, SamplingParams(temperature=0, max_tokens=1), wanted=wanted, **own)
    one.limit = len(ids)
    run(make_engine(random_runner()), [one])
    return kept.arrays()[path]


def test_vectors_are_added_to_the_modules_output():
    vector = Steering({"layers.0": np.linspace(-1, 1, WIDTH)}, scale=3.0)
    plain, moved = states(None, "layers.0"), states(vector, "layers.0")
    np.testing.assert_allclose(moved - plain, np.broadcast_to(3 * np.linspace(-1, 1, WIDTH), plain.shape), atol=1e-5)


def test_other_steps_are_the_same_programs():
    runner = random_runner()
    run(make_engine(runner), [request("a", None)])
    before = set(runner.programs.temporaries)
    run(make_engine(runner), [request("a", UP), request("b", None)])
    run(make_engine(runner), [request("a", None)])
    assert all(key in before or getattr(key, "steer", ()) for key in runner.programs.temporaries)


def test_bad_input_is_named():
    runner = random_runner()
    for vectors, kind, said in (
        ({}, TypeError, "an empty one"),
        ([1.0], TypeError, "must be a mapping"),
        ({"layers.0": "x"}, TypeError, r"steering\['layers.0'\]"),
        ({"layers.0": [[1.0]]}, ValueError, "one axis"),
        ({"layers.0": [np.nan]}, ValueError, "finite"),
        ({3: [1.0]}, TypeError, "a path"),
        ({"layers.0": [1.0]}, ValueError, "has 1 entries; the model's hidden states have 32"),
        ({"layers.9": np.ones(WIDTH)}, ConfigError, "0 to 1"),
    ):
        with pytest.raises(kind, match=said):
            steered.check(runner, Steering.of(vectors))
    with pytest.raises(ValueError, match="scale"):
        Steering({"layers.0": [1.0]}, scale=1e9)
