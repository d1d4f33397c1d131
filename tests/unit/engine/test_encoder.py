"""Encoder steps and the feature pool on the device; text-only models have neither."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from support.cases import GREEDY
from support.images import ROWS, SLOTS, alone, image, image_request, image_runner
from support.tiny import CHUNK, make_engine, random_runner, run, shapes

from jaxinfer import functional
from jaxinfer.config import EngineConfig
from jaxinfer.engine.runner.buckets import Needs, encode_pieces, prefill_bucket
from jaxinfer.engine.runner.keys import Encode
from jaxinfer.engine.runner.steps import abstract_arguments
from jaxinfer.engine.sizing.memory import Budget
from jaxinfer.engine.sizing.setup import choose_shapes
from jaxinfer.errors import CapacityError, ConfigError
from jaxinfer.functional import program as functional_program

pytestmark = [pytest.mark.xdist_group("internvl"), pytest.mark.slow]


def test_text_only_steps_have_no_encoder_inputs():
    runner = random_runner()
    bucket = prefill_bucket(runner.program, runner.shapes, CHUNK, Needs())
    arguments = abstract_arguments(runner.program, runner.shapes, bucket)
    assert bucket.takes == ("params", "cache", "rows", "edits") == ("params", *bucket.gives)
    assert list(bucket.shapes) == [
        "sampling",
        "tokens",
        "positions",
        "rows",
        "rope_lengths",
        "owners",
        "tiles",
        "count",
        "last",
        "targets",
    ]
    cache, rows, edits, packed = arguments
    assert packed.shape == (sum(int(np.prod(shape)) for shape in bucket.shapes.values()),)
    keys = runner.programs.keys()
    assert runner.features is None and not any(isinstance(key, Encode) for key in keys)


def test_a_prefill_with_images_has_the_pool_and_an_index_beside_it():
    runner = image_runner()
    bucket = prefill_bucket(runner.program, runner.shapes, CHUNK, Needs())
    pool = abstract_arguments(runner.program, runner.shapes, bucket)[3]
    assert bucket.takes[-1] == "features" and bucket.shapes["features"] == (CHUNK,)
    assert pool.shape == runner.features.shape == (SLOTS * ROWS, 32)
    assert pool.dtype == runner.features.dtype == np.float32


def test_a_warm_up_knows_every_step_of_a_prompt_with_images():
    runner = image_runner()
    run(make_engine(runner), [image_request("0", (1, image(3), 2), GREEDY)])
    assert {Encode(1), Encode(2)} <= set(runner.programs.seconds) <= set(runner.programs.keys())


def test_encoding_writes_its_slots_and_no_other_in_place():
    runner = image_runner()
    runner.reset()
    values = image(2, 5).values
    runner._launch(Encode(2), values, np.array([3, SLOTS], np.int32))
    pool = np.asarray(runner.features).reshape(SLOTS, ROWS, -1)
    expected = jax.jit(functional.encode, static_argnums=0)(runner.program, runner.params, values[:1])
    np.testing.assert_allclose(pool[3], expected[0], atol=1e-5)
    assert not np.delete(pool, 3, axis=0).any()
    memory = runner.programs.get(Encode(2)).memory_analysis()
    assert memory.alias_size_in_bytes >= runner.features.nbytes


@pytest.mark.parametrize(
    ("buckets", "count", "steps"),
    [
        ((1, 2, 4, 8), 13, [8, 4, 1]),
        ((1, 2), 5, [2, 2, 1]),
        ((4, 8), 3, [4]),
        ((1, 2, 4), 0, []),
    ],
)
def test_inputs_are_encoded_without_padding_where_that_can_be(buckets, count, steps):
    assert list(encode_pieces(shapes(encode_buckets=buckets), count)) == steps


def sizes(**settings) -> tuple[int, tuple[int, ...]]:
    """Feature slots and encoder buckets that an engine would choose."""
    runner = image_runner()
    config = EngineConfig(**dict(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32) | settings)
    made = choose_shapes(runner.program.module(runner.params).config, runner.program, config, Budget(1 << 20, ""))
    return made.feature_slots, made.encode_buckets


def test_the_pool_follows_the_settings():
    assert sizes() == (8 * 32 // ROWS, (1, 2, 4, 8))
    assert sizes(max_num_batched_tokens=4)[0] == 16
    assert sizes(feature_cache_tokens=23)[0] == 5
    with pytest.raises(ConfigError, match="feature_cache_tokens is 3, but one tile of an image takes 4; raise it"):
        sizes(feature_cache_tokens=3)
    for wrong in (0, True):
        with pytest.raises(ConfigError, match="feature_cache_tokens must be"):
            EngineConfig(feature_cache_tokens=wrong)


def test_images_that_never_fit_the_pool_are_refused():
    engine = make_engine(image_runner())
    with pytest.raises(CapacityError, match=rf"7 tiles \(28 tokens\) can never fit .* holds {SLOTS} tiles of 4 tokens"):
        engine.add(image_request("0", (image(4), 1, image(3, 1), 1), GREEDY))
    assert not engine.requests
    run(engine, [image_request("1", (image(4), 1, image(4), 1), GREEDY)])  # equal images share their slots


@pytest.mark.parametrize("failures", [1, 9])
def test_a_failed_encoder_step_is_tried_again_and_given_up(monkeypatch, failures):
    wanted = image_request("0", (2, image(1, 3), 4), GREEDY)
    [expected] = alone([wanted])
    engine, left = make_engine(image_runner()), [failures]
    launch = engine.runner._launch

    def failing(key, *arrays):
        if isinstance(key, Encode) and left[0]:
            left[0] -= 1
            raise RuntimeError("no memory")
        return launch(key, *arrays)

    monkeypatch.setattr(engine.runner, "_launch", failing)
    made = run(engine, [wanted])
    assert engine.scheduler.encoder_cache.pool.num_pinned == 0
    if failures == 1:
        assert made == [expected]
    else:
        assert (
            wanted.sequences[0].finish_reason == "error"
            and "the encoder step of 1 failed: RuntimeError" in wanted.error
        )


def test_a_module_whose_encoder_makes_something_else_is_refused():
    program, params = image_runner().program, image_runner().params
    wrong = replace(program, features=replace(program.features, rows=ROWS + 1))
    with pytest.raises(
        ConfigError, match=r"encode returns shape \(1, 4, 32\) for inputs \(1, 3, 28, 28\).* declares 5 rows"
    ):
        functional_program._feature_width(wrong, params)
