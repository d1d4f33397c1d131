"""Prompts with images of any size (Qwen3-VL) give the same tokens in any batch, chunks, caches and pools."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from support.cases import GREEDY, SEEDED
from support.qwen3_vl import image, request, runner
from support.tiny import BLOCK, LENGTH, ROWS, joint_runner, make_engine, run

from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.speculation import drafter
from jaxinfer.media import EncoderInput
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.speculative_config import SpeculativeConfig

pytestmark = [pytest.mark.xdist_group("qwen3_vl"), pytest.mark.slow]

A, B, C, LARGE = image(2, 3, 1), image(2, 3, 2), image(1, 5, 3), image(4, 6, 4)
PROMPTS = ((5, A, 3), (4,), (1, LARGE, 7), (5, B, 3), (A, 2), (3, A, 1, C, 2, B, 1), (21,), (6, C, A))
"""Words and images: at either end, several, next to each other, repeated, as large as the feature pool, and none."""


def requests(params: SamplingParams | None = None, parts=PROMPTS) -> list[Request]:
    """One request per prompt, greedy and seeded in turn."""
    return [request(str(i), part, params or (GREEDY, SEEDED)[i % 2], seed=40 * i) for i, part in enumerate(parts)]


def expected(wanted: Sequence[Request]) -> list[list[list[int]]]:
    """The tokens of each request when it runs alone."""
    copies = [Request(one.id, one.prompt, one.params, one.limit, seed=one.seed, inputs=one.inputs) for one in wanted]
    return [run(make_engine(runner(), prefix_caching=False, block_sharing=False), [one])[0] for one in copies]


@cache
def alone() -> list[list[list[int]]]:
    return expected(requests())


@pytest.mark.parametrize(("budget", "joint"), [(3, False), (7, False), (16, False), (16, True)])
def test_a_mixed_batch_in_chunks_that_cut_images(budget, joint):
    engine = make_engine(joint_runner(runner()) if joint else runner(), budget=budget)
    assert run(engine, requests()) == alone()
    engine.scheduler.encoder_cache.check()
    assert engine.scheduler.encoder_cache.pool.num_pinned == 0 and not engine.scheduler.encoder_cache.rows
    assert not joint or any(getattr(key, "decodes", 0) for key in runner().programs.seconds)


def test_results_depend_on_the_image_and_on_its_grid():
    values = image(2, 3, 1).values
    across = EncoderInput("image", values, 1, numbers=image(3, 2).numbers)
    plain = EncoderInput("image", np.zeros_like(values), 1, numbers=image(2, 3).numbers)
    turned = EncoderInput("image", np.zeros_like(values), 1, numbers=image(3, 2).numbers)
    made = expected([request("0", (5, one, 3), GREEDY) for one in (A, B, across, plain, turned)])
    assert len({tuple(samples[0]) for samples in made}) == 5


@pytest.mark.parametrize("other", [B, EncoderInput("image", A.values, 1, numbers=image(3, 2).numbers)])
def test_a_hit_needs_the_same_image(other):
    wanted = [request(str(i), (BLOCK + 1, one, 9), GREEDY) for i, one in enumerate((A, other, A))]
    assert len({tuple(one.prompt.tolist()) for one in wanted}) == 1
    engine, alike = make_engine(runner()), expected(wanted)
    assert [run(engine, [one])[0] for one in wanted] == alike and alike[0] != alike[1]
    assert [one.cached_tokens for one in wanted] == [0, BLOCK, (len(wanted[0].prompt) - 1) // BLOCK * BLOCK]


def test_a_hit_that_ends_within_an_image_or_after_it():
    whole, part, longer = (
        request(str(i), parts, GREEDY) for i, parts in enumerate([(2, LARGE, 6), (2, LARGE), (2, LARGE, 8)])
    )
    alike, engine = expected([whole, part, longer]), make_engine(runner())
    made = run(engine, [whole])
    engine.scheduler.encoder_cache.reset()
    assert [*made, *run(engine, [part]), *run(engine, [longer])] == alike
    assert part.cached_tokens == (2 + LARGE.length - 1) // BLOCK * BLOCK and longer.cached_tokens > 2 + LARGE.length


@pytest.mark.parametrize("host", [{}, {"block_sharing": False, "prefix_caching": False}])
def test_samples_of_one_prompt(host):
    wanted = [request("0", (3, A, 2, C, 2), SamplingParams(temperature=0.1, seed=5, n=3, max_tokens=8))]
    alike = expected(wanted)
    assert run(make_engine(runner(), **host), wanted) == alike


def test_preempted_and_computed_again():
    params = SamplingParams(temperature=0, max_tokens=24)
    wanted = requests(params, PROMPTS[:6])
    alike = expected(wanted)
    engine = make_engine(runner(), pool_blocks=24, prefix_caching=False, budget=5)
    assert run(engine, wanted) == alike
    assert engine.scheduler.preempted


def test_image_tokens_that_are_made_are_text():
    """The image token may be sampled like any other; when the sequence is recomputed it is not an image."""
    params = SamplingParams(temperature=0, max_tokens=12, allowed_token_ids=[90])
    wanted = [request("0", (2, A, 3), params), request("1", (30,), params)]
    alike = expected(wanted)
    assert run(make_engine(runner(), pool_blocks=13, prefix_caching=False, budget=4), wanted) == alike


def _contiguous() -> Runner:
    own = runner()
    return Runner(own.program, own.params, replace(own.shapes, contiguous=True, num_blocks=ROWS * LENGTH // BLOCK))


def _deterministic() -> Runner:
    own = runner()
    return Runner(replace(own.program, deterministic=True), own.params, replace(own.shapes, switched=True))


def test_drafts_of_right_tokens(monkeypatch):
    """Generated tokens of a verified draft turn by positions that images have shifted."""
    wanted, own = requests(GREEDY, PROMPTS[:4]), runner()
    alike = expected(wanted)
    whole = [[*one.prompt.tolist(), *samples[0]] for one, samples in zip(wanted, alike, strict=True)]

    def draft(tokens, count, longest, shortest):
        found = next(one for one in whole if one[: len(tokens)] == tokens.tolist())
        return np.array(found[len(tokens) : len(tokens) + count], np.int32)

    monkeypatch.setattr(drafter, "find_draft", draft)
    monkeypatch.setattr(drafter.Payoff, "note_verify", lambda *_: None)
    verifying = Runner(own.program, own.params, replace(own.shapes, verify_buckets=(16,)), programs=own.programs)
    engine = make_engine(verifying, speculative=SpeculativeConfig(num_speculative_tokens=3))
    assert run(engine, wanted) == alike
    drafted, accepted = (engine.metrics.counters[f"spec_decode_num_{name}_tokens"] for name in ("draft", "accepted"))
    assert accepted == drafted > 0


@pytest.mark.parametrize("make", [_contiguous, _deterministic, lambda: runner(2)], ids=["contiguous", "one step", "tp"])
def test_another_cache_step_or_mesh(make):
    assert run(make_engine(make(), budget=7), requests()) == alone()
