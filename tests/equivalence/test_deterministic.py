"""deterministic=True: tokens and log-probabilities are the same bit for bit whatever else runs."""

import os
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import cross, images, tiny
from support.cases import EDGES, poison
from support.tiny import BLOCK, CHUNK, deterministic_runner, make_engine, make_request, prompt

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.buckets import step_shape
from jaxinfer.engine.runner.keys import EncodeCross
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.functional import training
from jaxinfer.kv import groups as kv_groups
from jaxinfer.sampling_params import SamplingParams

Made: TypeAlias = list[list[tuple[list[int], list[float]]]]
"""Tokens of each sample of each request, and their log-probabilities."""

MADE = 10
PREFIX = prompt(3 * BLOCK, 99)
Case: TypeAlias = tuple[str, str, str] | tuple[str, str, str, int]
QUICK: list[Case] = [("llama", "bfloat16", "auto"), ("gemma3", "bfloat16", "auto"), ("qwen3_moe", "bfloat16", "auto")]
QUICK += [("deepseek_v3", "bfloat16", "auto"), ("qwen3_next", "bfloat16", "auto"), ("llama", "int8", "auto")]
QUICK += [("llama", "float32", "xla"), ("llama", "bfloat16", "auto", 2), ("llama", "4 bits", "auto")]
QUICK += [("llama", "bfloat16/int8", "auto"), ("llama", "fp8", "auto")]
OTHERS: list[Case] = [("kimi_linear", "float32", "auto"), ("gpt_oss", "bfloat16", "auto"), ("qwen3_moe", "int8", "xla")]
OTHERS += [
    ("gpt_oss", "4 bits", "auto"),
    ("gemma2", "bfloat16", "xla"),
    ("qwen3_next", "float32", "xla"),
    ("gemma3", "bfloat16/fp8", "auto"),
    ("gemma4", "bfloat16", "auto"),
]
OTHERS += [
    ("deepseek_v3", "bfloat16/fp8", "auto"),
    ("llama", "bfloat16/fp8", "auto", 2),
    ("gemma2", "float32/int8", "xla"),
]


OF_A_FAMILY = [("bfloat16", "auto"), ("int8", "auto"), ("float32", "xla"), ("bfloat16", "auto", 2)]
WIDE = [(family, *case) for family in (*tiny.ARCHITECTURES, *tiny.VARIANTS) for case in OF_A_FAMILY]
"""Every text family, which takes an hour: with JAXINFER_ALL_FAMILIES=1 only."""


def _case(case: Case, *marks: pytest.MarkDecorator) -> object:
    family, *how, tp = case if len(case) == 4 else (*case, 1)
    name = " ".join([family, *how, *([f"tp{tp}"] if tp > 1 else [])])
    return pytest.param(family, *how, tp, marks=(*marks, pytest.mark.xdist_group(f"deterministic {family}")), id=name)


CASES = [_case(case) for case in QUICK] + [_case(case, pytest.mark.slow) for case in OTHERS]
if os.environ.get("JAXINFER_ALL_FAMILIES"):
    CASES += [_case(case, pytest.mark.slow) for case in WIDE if case not in QUICK + OTHERS]
"""Family, dtype, kernels ("auto" is native where this machine has AVX2), and devices if more than one."""


def requests() -> list[Request]:
    """Return greedy and seeded requests of prompts at block and chunk ends, some of which begin alike."""
    plain = [_request(i, prompt(length, i)) for i, length in enumerate(EDGES)]
    return plain + [_request(20 + i, PREFIX + prompt(2 * i + 1, 20 + i)) for i in range(4)]


def _request(number: int, ids: Sequence[int]) -> Request:
    greedy = number % 2 == 0
    params = SamplingParams(temperature=0.0 if greedy else 0.8, seed=number, max_tokens=MADE, logprobs=0)
    return make_request(str(number), ids, params)


def neighbours() -> list[Request]:
    """Return requests that need every part of the sampler."""
    needs = [dict(top_p=0.9), dict(top_k=5), dict(presence_penalty=0.5), dict(repetition_penalty=1.2), dict(logprobs=5)]
    return [
        make_request(f"n{i}", prompt(5 + 3 * i, 50 + i), SamplingParams(temperature=0.7, seed=i, max_tokens=15, **own))
        for i, own in enumerate(needs)
    ]


def made(wanted: Sequence[Request]) -> Made:
    assert all(s.finish_reason != "error" for request in wanted for s in request.sequences)
    return [[(s.output_ids.tolist(), [own for own, *_ in s.logprobs]) for s in r.sequences] for r in wanted]


def run(engine: Engine, wanted: Sequence[Request], *others: Request, steps_apart: int = 0) -> Made:
    """Run requests, each `steps_apart` steps after the one before, and return what they made."""
    for request in (*wanted, *others):
        engine.add(request)
        for _ in range(steps_apart):
            engine.step()
    while engine.has_work:
        engine.step()
    return made(wanted)


def alone(runner: Runner, wanted: Sequence[Request]) -> Made:
    """Run each request in an empty engine without a prefix cache."""
    return [run(make_engine(runner, prefix_caching=False), [request])[0] for request in wanted]


def scored(runner: Runner, ids: Sequence[int], count: int) -> list[float]:
    """Return the log-probabilities of the last `count` tokens of a prompt, as `prompt_logprobs` gives them."""
    request = make_request("scored", ids, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    run(make_engine(runner, budget=runner.shapes.prefill_buckets[-1]), [request], _request(60, prompt(11, 60)))
    found = np.concatenate([np.asarray(part.chosen) for part in request.prompt_logprobs])
    return found[-count:].tolist()


def preempted(runner: Runner) -> Made:
    wanted = requests()
    longest = max(len(request.prompt) + MADE for request in wanted)
    pool = kv_groups.blocks_needed(runner.program.layout.kinds, longest, BLOCK, CHUNK) + 6
    engine = make_engine(runner, pool_blocks=pool)
    poison(runner)
    found = run(engine, wanted)
    assert engine.scheduler.preempted > 0
    return found


def found_prefixes(runner: Runner) -> Made:
    engine, again = make_engine(runner), requests()
    run(engine, requests())
    found = run(engine, again)
    assert sum(request.cached_tokens > 0 for request in again) > 2
    return found


WAYS: dict[str, Callable[[Runner], Made]] = {
    "in a batch": lambda runner: run(make_engine(runner), requests()),
    "in another order": lambda runner: run(make_engine(runner), requests()[::-1])[::-1],
    "one after another": lambda runner: run(make_engine(runner), requests(), steps_apart=2),
    "beside others": lambda runner: run(make_engine(runner), requests(), *neighbours()),
    "in chunks of 9": lambda runner: run(make_engine(runner, budget=9), requests()),
    "eight steps a dispatch": lambda runner: run(make_engine(runner, decode_steps=8), requests()),
    "with prefixes found": found_prefixes,
    "preempted": preempted,
}


@pytest.mark.parametrize(("family", "dtype", "kernel", "tp"), CASES)
def test_whatever_else_runs(family: str, dtype: str, kernel: str, tp: int):
    runner = deterministic_runner(family, dtype, kernel, tp=tp)
    expected = alone(runner, requests())
    assert len({tuple(tokens) for ((tokens, _),) in expected}) > len(expected) // 2, "prompts make no difference"
    for name, way in WAYS.items():
        assert way(runner) == expected, name


@pytest.mark.parametrize(("family", "dtype", "kernel", "tp"), CASES)
def test_a_decode_step_gives_what_prefill_gives(family: str, dtype: str, kernel: str, tp: int):
    runner = deterministic_runner(family, dtype, kernel, tp=tp)
    for request, ((tokens, logprobs),) in zip(requests(), alone(runner, requests()), strict=True):
        assert scored(runner, request.prompt.tolist() + tokens, len(tokens)) == logprobs, request.id


@pytest.mark.parametrize(("family", "dtype", "kernel", "tp"), CASES)
def test_a_fork_is_a_lone_sample(family: str, dtype: str, kernel: str, tp: int):
    runner = deterministic_runner(family, dtype, kernel, tp=tp)
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=MADE, n=3, logprobs=0)
    ids = prompt(2 * CHUNK - 1, 7)
    [together] = run(make_engine(runner), [make_request("n", ids, params)], _request(8, prompt(9, 8)))
    for index, expected in enumerate(together):
        lone = make_request("lone", ids, params)
        lone.sequences = [lone.sequences[index]]
        assert run(make_engine(runner), [lone]) == [[expected]]


@pytest.mark.parametrize(
    ("family", "dtype", "tp"),
    [
        pytest.param(family, dtype, tp, marks=[pytest.mark.xdist_group(f"deterministic {family}"), *marks])
        for family, dtype, tp, *marks in (
            ("llama", "bfloat16", 1),
            ("gemma3", "bfloat16", 1),
            ("qwen3_moe", "bfloat16", 1),
            ("qwen3_next", "bfloat16", 1),
            ("llama", "bfloat16", 2),
            ("gemma3", "bfloat16", 2, pytest.mark.slow),
            ("qwen3_moe", "bfloat16", 2, pytest.mark.slow),
            ("qwen3_next", "bfloat16", 2, pytest.mark.slow),
            ("llama", "bfloat16/int8", 1, pytest.mark.slow),
            ("gemma4", "bfloat16", 1, pytest.mark.slow),
        )
    ],
)
def test_a_trainer_gets_the_engines_bits(family: str, dtype: str, tp: int):
    """Prompts of several lengths and what was sampled after them, of one length in all; with `remat`, which may change
    no value, and on a mesh."""
    runner, length = deterministic_runner(family, dtype, tp=tp), 2 * CHUNK + 8
    params = [SamplingParams(temperature=0.7, seed=n, max_tokens=length - n, logprobs=0) for n in (1, CHUNK, 21, 33)]
    wanted = [make_request(str(p.seed), prompt(p.seed, p.seed), p) for p in params]
    rollouts = run(make_engine(runner), wanted)
    module = runner.program.module(runner.params)
    training.prepare(module)
    graph, weights = nnx.split(module, nnx.Param)
    shape = step_shape(runner.program, runner.shapes, "auto")
    ids = np.array([request.prompt.tolist() + tokens for request, ((tokens, _),) in zip(wanted, rollouts, strict=True)])

    @jax.jit
    def trained(weights: nnx.State) -> tuple[jax.Array, jax.Array]:
        own = nnx.merge(graph, weights)
        served = training.logprobs(own, jnp.asarray(ids), serving=shape, remat=True)
        return served, training.logprobs(own, jnp.asarray(ids))

    served, plain = (np.asarray(found) for found in trained(weights))
    equal = []
    for request, ((_, rollout),), own, other in zip(wanted, rollouts, served, plain, strict=True):
        start = len(request.prompt) - 1
        assert own[start:].tolist() == rollout
        equal += (other[start:] == np.float32(rollout)).tolist()
    assert not all(equal), "plain operations give the same bits, so this test shows nothing"


@pytest.mark.xdist_group("deterministic llama")
def test_default_steps_differ():
    """So that the tests above can fail: without `deterministic`, a step of 64 tokens gives other bits than one of 8."""
    runner = deterministic_runner("llama", "bfloat16", on=False)
    found = [
        scored(runner, request.prompt.tolist() + tokens, len(tokens)) == logprobs
        for request, ((tokens, logprobs),) in zip(requests(), alone(runner, requests()), strict=True)
    ]
    assert not all(found)


@pytest.mark.xdist_group("deterministic cross")
def test_encoder_inputs_are_computed_alone(monkeypatch):
    runner, encoded = cross.deterministic_runner(), []
    replay = runner.replay
    monkeypatch.setattr(runner, "replay", lambda key, arrays: encoded.append(key) or replay(key, arrays))

    def wanted() -> list[Request]:
        params = SamplingParams(temperature=0, max_tokens=MADE, logprobs=0)
        return [
            cross.cross_request(str(i), cross.text(length, i), params, [cross.START, *prompt(i % 3, 40 + i)])
            for i, length in enumerate((1, BLOCK, CHUNK + 1, 33, 9))
        ]

    expected = alone(runner, wanted())
    encoded.clear()
    assert run(make_engine(runner), wanted()) == expected
    # Tiny encoders may give the same bits in a batch, which larger ones do not.
    assert sum(isinstance(key, EncodeCross) for key in encoded) == len(expected)
    assert run(make_engine(runner, budget=5), wanted()[::-1], steps_apart=1)[::-1] == expected


@pytest.mark.slow
@pytest.mark.xdist_group("deterministic images")
def test_images_are_encoded_alone():
    runner = images.deterministic_runner()
    parts = [(5, images.image(1, 1), 3), (4,), (1, images.image(3, 3), 7), (images.image(1, 2), 2)]

    def wanted() -> list[Request]:
        params = SamplingParams(temperature=0, max_tokens=MADE, logprobs=0)
        return [images.image_request(str(i), own, params) for i, own in enumerate(parts)]

    expected = alone(runner, wanted())
    assert run(make_engine(runner), wanted()) == expected
    assert run(make_engine(runner, budget=5), wanted()[::-1], steps_apart=1)[::-1] == expected


@pytest.mark.slow
@pytest.mark.xdist_group("deterministic llama")
def test_another_runner_gives_the_same_bits():
    """Compiled once more, over other numbers of rows in the cache."""
    runner = deterministic_runner("llama", "bfloat16")
    expected = alone(runner, requests())
    again = Runner(runner.program, runner.params, tiny.shapes_of(runner.program, switched=True, num_blocks=300))
    assert alone(again, requests()) == expected
