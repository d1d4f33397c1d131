"""Prompts with images give the same tokens in any batch and with any chunks, caches and pool sizes."""

import numpy as np
import pytest
from support.cases import GREEDY, SEEDED
from support.images import SLOTS, alone, image, image_request, image_runner
from support.tiny import BLOCK, CHUNK, LENGTH, make_engine, run

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.sampling_params import SamplingParams

pytestmark = [pytest.mark.xdist_group("internvl"), pytest.mark.slow]

A, B, LARGE = image(1, 1), image(1, 2), image(3, 3)
PROMPTS = (
    (5, A, 3),
    (4,),
    (1, LARGE, 7),
    (5, B, 3),
    (A, 2),
    (3, A, 1, B, 2, LARGE, 1),
    (21,),
    (2, image(SLOTS, 9), 1),
    (6, LARGE),
)
"""Words and images: at either end, several, repeated, as many tiles as the feature pool holds, and none."""


def requests(params: SamplingParams | None = None, parts=PROMPTS) -> list[Request]:
    """One request per prompt, greedy and seeded in turn."""
    return [image_request(str(i), part, params or (GREEDY, SEEDED)[i % 2], seed=40 * i) for i, part in enumerate(parts)]


def count(engine: Engine, name: str) -> int:
    return engine.metrics.counters[name]


def settled(engine: Engine) -> None:
    """Assert that nothing is pinned once nothing runs."""
    engine.scheduler.encoder_cache.check()
    assert engine.scheduler.encoder_cache.pool.num_pinned == 0 and not engine.scheduler.encoder_cache.rows


@pytest.mark.parametrize("budget", [3, 7, CHUNK])
def test_a_mixed_batch_in_chunks_that_cut_images(budget):
    wanted = requests()
    expected = alone(wanted)
    engine = make_engine(image_runner(), budget=budget)
    assert run(engine, wanted) == expected
    settled(engine)


def test_tokens_depend_on_the_image():
    made = alone([image_request(str(seed), (5, image(1, seed), 3), GREEDY) for seed in range(4)])
    assert len({tuple(samples[0]) for samples in made}) == 4


def test_the_order_of_images_matters():
    one, other = alone([image_request("0", (2, A, 1, B, 2), GREEDY), image_request("1", (2, B, 1, A, 2), GREEDY)])
    assert one != other


def test_a_distinct_image_is_encoded_once():
    wanted = [image_request(str(i), (i + 1, A, 2, LARGE, 3), GREEDY, seed=50 * i) for i in range(5)]
    expected = alone(wanted)
    engine = make_engine(image_runner(), prefix_caching=False)
    assert run(engine, wanted) == expected
    assert (count(engine, "mm_cache_queries"), count(engine, "mm_cache_hits")) == (10, 8)
    assert count(engine, "encoder_inputs") == A.count + LARGE.count


def test_an_image_is_pinned_until_its_prompt_is_computed_and_no_longer():
    request = image_request("0", (2, LARGE, 9), GREEDY)
    engine = make_engine(image_runner(), budget=6)
    engine.add(request)
    pinned = []
    while request.first_token_time is None:
        engine.step()
        pinned.append(engine.scheduler.encoder_cache.pool.num_pinned)
    assert pinned[:3] == [LARGE.count] * 3 and pinned[3:] == [0] * len(pinned[3:]) and len(pinned) > 3
    assert not request.finished
    engine.abort("0")


def test_images_of_several_prompts_are_encoded_in_one_step():
    engine, sizes = make_engine(image_runner()), []
    launch = engine.runner._launch
    engine.runner._launch = lambda key, *arrays: (sizes.append((type(key).__name__, key)), launch(key, *arrays))[1]
    try:
        run(engine, [image_request(str(i), (1, image(1, 20 + i), 1), GREEDY) for i in range(2)])
    finally:
        del engine.runner._launch
    assert [key.count for name, key in sizes if name == "Encode"] == [2]


def test_a_prompt_whose_image_lies_in_cached_blocks_encodes_nothing():
    first, again, longer = (image_request(str(i), (2, LARGE, 6 + i), GREEDY) for i in range(3))
    expected = alone([first, again, longer])
    engine = make_engine(image_runner())
    made = run(engine, [first])
    engine.scheduler.encoder_cache.reset()  # so that only the prefix cache can serve it
    assert [*made, *run(engine, [again]), *run(engine, [longer])] == expected
    assert again.cached_tokens >= 2 + LARGE.length and count(engine, "encoder_inputs") == LARGE.count
    assert count(engine, "mm_cache_queries") == 1


def test_an_image_that_is_partly_in_cached_blocks_is_encoded_again():
    whole, part = image_request("0", (2, LARGE, 6), GREEDY), image_request("1", (2, LARGE), GREEDY)
    expected = alone([whole, part])
    engine = make_engine(image_runner())
    made = run(engine, [whole])
    engine.scheduler.encoder_cache.reset()
    assert [*made, *run(engine, [part])] == expected
    assert part.cached_tokens == (2 + LARGE.length - 1) // BLOCK * BLOCK
    assert count(engine, "encoder_inputs") == 2 * LARGE.count


def test_another_image_in_the_same_places_is_never_a_hit():
    parts = [(BLOCK + 1, one, 9) for one in (A, B, A)]
    wanted = [image_request(str(i), part, GREEDY) for i, part in enumerate(parts)]
    assert len({tuple(request.prompt.tolist()) for request in wanted}) == 1
    expected = alone(wanted)
    engine = make_engine(image_runner())
    assert [run(engine, [request])[0] for request in wanted] == expected
    assert [request.cached_tokens for request in wanted] == [0, BLOCK, (len(wanted[0].prompt) - 1) // BLOCK * BLOCK]


@pytest.mark.parametrize("host", [{}, {"block_sharing": False}, {"block_sharing": False, "prefix_caching": False}])
def test_samples_of_one_prompt(host):
    params = SamplingParams(temperature=0.1, seed=5, n=4, max_tokens=8)
    wanted = [image_request("0", (3, A, 2, LARGE, 2), params)]
    expected = alone(wanted)
    engine = make_engine(image_runner(), **host)
    assert run(engine, wanted) == expected
    assert count(engine, "encoder_inputs") == A.count + LARGE.count
    settled(engine)


def test_preempted_and_computed_again():
    wanted = requests(SamplingParams(temperature=0, max_tokens=24), PROMPTS[:7])
    expected = alone(wanted)
    engine = make_engine(image_runner(), pool_blocks=24, prefix_caching=False, budget=5)
    assert run(engine, wanted) == expected
    assert engine.scheduler.preempted
    settled(engine)


def test_a_feature_pool_too_small_for_all_images_at_once():
    wanted = [image_request(str(i), (2, image(SLOTS - 2, 60 + i % 3), 4), GREEDY) for i in range(6)]
    expected = alone(wanted)
    engine = make_engine(image_runner(), prefix_caching=False, budget=6)
    assert run(engine, wanted) == expected
    settled(engine)


def test_a_failed_step_makes_a_new_pool():
    wanted = requests(GREEDY, PROMPTS[:4])
    expected = alone(wanted)
    engine = make_engine(image_runner(), budget=6)
    for request in wanted:
        engine.add(request)
    for _ in range(2):
        engine.step()
    pool = engine.runner.features
    engine.recovery.recover(KeyboardInterrupt())
    assert engine.runner.features is not pool and not np.asarray(engine.runner.features).any()
    while engine.has_work:
        engine.step()
    assert [[s.output_ids.tolist() for s in request.sequences] for request in wanted] == expected
    settled(engine)


@pytest.mark.parametrize("steps", range(5))
def test_an_abort_releases_its_images_and_leaves_others_unchanged(steps):
    kept, gone = image_request("kept", (3, A, 8), GREEDY), image_request("gone", (1, LARGE, 9), GREEDY)
    [expected] = alone([kept])
    engine = make_engine(image_runner(), budget=5)
    for request in (gone, kept):
        engine.add(request)
    for _ in range(steps):
        engine.step()
    engine.abort("gone")
    engine.scheduler.encoder_cache.check()
    while engine.has_work:
        engine.step()
    assert [kept.sequences[0].output_ids.tolist()] == expected
    settled(engine)


def test_a_random_workload():
    rng = np.random.default_rng(0)
    wanted = [
        image_request(
            str(i),
            (
                int(rng.integers(1, 9)),
                image(int(rng.integers(1, 4)), int(rng.integers(4)) + 70),
                int(rng.integers(1, 9)),
            ),
            (GREEDY, SEEDED)[i % 2],
            seed=int(rng.integers(2)),
        )
        for i in range(30)
    ]
    expected = alone(wanted)
    engine = make_engine(image_runner(), pool_blocks=LENGTH // BLOCK, budget=9)
    assert run(engine, wanted) == expected
    assert count(engine, "mm_cache_hits") and engine.manager.pool.num_blocks * BLOCK < sum(
        len(r.prompt) for r in wanted
    )
    settled(engine)


def test_token_ids_that_are_made_keep_their_own_embedding():
    """The image token may be sampled like any other; when the sequence is recomputed it is not an image."""
    params = SamplingParams(temperature=0, max_tokens=12, allowed_token_ids=[90])
    wanted = [image_request("0", (2, A, 3), params), image_request("1", (30,), params)]
    expected = alone(wanted)
    engine = make_engine(image_runner(), pool_blocks=13, prefix_caching=False, budget=4)
    assert run(engine, wanted) == expected
    assert set(wanted[0].sequences[0].output_ids.tolist()) == {90}


@pytest.mark.parametrize("tp", [2])
def test_divided_over_devices(tp):
    wanted = requests(parts=PROMPTS[:6])
    expected = alone(wanted)
    engine = make_engine(image_runner(tp), budget=7)
    assert run(engine, wanted) == expected
    settled(engine)
