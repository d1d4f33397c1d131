"""Steps of models with cross-attention: encoder batches, step inputs and warm-up."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from support.cases import GREEDY
from support.cross import UNITS, cross_request, cross_runner, text
from support.tiny import BLOCK, CHUNK, ROWS, make_engine, random_runner, run

from jaxinfer.engine.multihost.replay import decode_key, encode_key
from jaxinfer.engine.runner.buckets import Needs, decode_bucket, encode_shape, encode_steps, prefill_bucket
from jaxinfer.engine.runner.keys import EncodeCross
from jaxinfer.functional.encoder_batch import EncodeJob, EncodeShape, encode_batch
from jaxinfer.media import CrossInputs, EncoderInput
from jaxinfer.models.base import CrossSource

pytestmark = pytest.mark.xdist_group("cross")

TEXT = CrossSource("text", (), 1, 64, joint=True)
IMAGES = CrossSource("image", (2, 3), 5, 64, numbers=1)


def job(length: int, seed: int = 0, first: int = 0) -> EncodeJob:
    blocks = np.arange(2 * 16, dtype=np.int32).reshape(2, 16) + 100 * seed
    return EncodeJob(text(length, seed), blocks, first)


def test_batched_encoder_texts_attend_to_themselves_only():
    jobs, shape = [job(3), job(6, 1)], EncodeShape(16, 1, 2, 4, tile=4)
    batch = encode_batch(TEXT, jobs, BLOCK, 1000, shape)
    np.testing.assert_array_equal(batch.inputs[:9], np.concatenate([one.input.values for one in jobs]))
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5] + [0] * 7
    assert batch.count == 3
    assert batch.tiles[:3].tolist() == [[0, 0, 0, 3], [0, 3, 0, 4], [0, 7, 4, 2]]
    assert batch.spans[:3].tolist() == [[0, 3], [3, 9], [3, 9]]
    assert batch.blocks[0].tolist() == [0] * 3 + [100] * 4 + [101] * 2 + [1000] * 7, "padding is written nowhere"
    assert batch.blocks[1, :9].tolist() == [16] * 3 + [116] * 4 + [117] * 2
    assert batch.offsets[:9].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]


def test_values_that_are_encoded_apart_and_kept_in_part():
    """The second image of a request, whose positions begin where those of the first end."""
    values = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    one = EncoderInput("image", values, 5, num_positions=7, numbers=np.array([[3], [4]]))
    blocks = np.arange(16, dtype=np.int32)[None]
    batch = encode_batch(IMAGES, [EncodeJob(one, blocks, 6)], BLOCK, 1000, EncodeShape(3, 5, 1, 3, tile=4))
    assert batch.inputs.shape == (3, 2, 3) and batch.numbers.tolist() == [[3], [4], [0]]
    assert batch.positions.tolist() == [*range(5)] * 2 + [0] * 5
    assert batch.spans[: batch.count].tolist() == [[0, 5]] * 2 + [[5, 10]] * 2
    at = np.arange(6, 13)
    assert (
        batch.blocks[0].tolist() == [*(at // BLOCK), *[1000] * 8]
        and batch.offsets[:7].tolist() == (at % BLOCK).tolist()
    )


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([5], [[5]]),
        ([16, 16], [[16, 16]]),
        ([16, 17], [[16], [17]]),
        ([1] * 5, [[1] * 4, [1]]),
        ([20, 2, 30, 1, 1], [[20, 2], [30, 1, 1]]),
    ],
)
def test_a_step_takes_as_many_inputs_as_it_has_room_for(lengths, expected):
    steps = encode_steps([job(length) for length in lengths], EncodeShape(32, 1, 2, 4))
    assert [[one.input.count for one in step] for step in steps] == expected


def test_step_inputs_have_seen_ranges_only_with_cross_attention():
    runner, plain = cross_runner(), random_runner()
    for made, cross in ((runner, True), (plain, False)):
        program, shapes = made.program, made.shapes
        prefill, decode = (
            prefill_bucket(program, shapes, CHUNK, Needs()),
            decode_bucket(program, shapes, ROWS, 8, Needs()),
        )
        assert ("seen" in prefill.shapes, "seen" in decode.shapes) == (cross, cross)
        assert decode.groups == 1, "a decode step only writes to groups that grow"


def test_a_warm_up_knows_every_step():
    runner = cross_runner()
    for length in (3, UNITS[0] + 1):
        run(make_engine(runner), [cross_request("0", text(length), GREEDY)])
    used = {key for key in runner.programs.seconds if isinstance(key, EncodeCross)}
    assert {key.units for key in used} == set(UNITS) and set(runner.programs.seconds) <= set(runner.programs.keys())
    for key in used:
        assert decode_key(encode_key(key)) == key, "the key can be sent to other processes"


def test_encoding_writes_its_blocks_and_no_others():
    runner = cross_runner()
    runner.reset()
    blocks = np.array([[7, 9, 0, 0]], np.int32)
    for launch in runner._packer._encodes_cross([EncodeJob(text(BLOCK + 1), blocks, 0)]):
        runner._run_launch(launch)
    for array in jax.tree.leaves(runner.cache):
        written = np.asarray(array).any(axis=(1, 3))
        assert written[7].all() and written[9].tolist() == [True] + [False] * (BLOCK - 1)
        assert not np.delete(written, [7, 9], axis=0).any()
    key = EncodeCross(**vars(encode_shape(runner.program, runner.shapes, BLOCK + 1)))
    memory = runner.programs.get(key).memory_analysis()
    assert memory.alias_size_in_bytes >= sum(a.nbytes for a in jax.tree.leaves(runner.cache)), (
        "the cache is updated in place"
    )


def test_a_plan_encodes_at_most_one_steps_inputs():
    engine = make_engine(cross_runner())
    engine.scheduler.admission.limits = replace(engine.scheduler.limits, encode_units=20)
    for i, length in enumerate((12, 8, 30, 5)):
        engine.add(cross_request(str(i), text(length, i), GREEDY))
    made = []
    while engine.has_work:
        engine.step()
        made.append(engine.metrics.counters["encoder_inputs"])
    assert made[:3] == [2, 3, 4], "two that fit together, one that is too long for any, the last"


def test_seen_ranges_of_tokens():
    both = CrossInputs((text(9), text(5, 1)), ((2, 0, 9), (5, 9, 14)))
    assert both.length == 14 and both.seen(1, 5).tolist() == [[0, 0], [0, 9], [0, 9], [0, 9], [9, 14]]
    assert both.seen(40, 1).tolist() == [[9, 14]], "output tokens see what the last prompt token sees"
    assert [both.parts(0, n) for n in (1, 2, 3, 5, 6)] == [1, 1, 2, 2, 3] and both.parts(2, 3) == 1
    assert (
        both.tokens_within(0, 1),
        both.tokens_within(0, 2),
        both.tokens_within(0, 3),
        both.tokens_within(2, 1),
        both.tokens_within(5, 1),
    ) == (
        2,
        5,
        None,
        3,
        None,
    )
    whole = CrossInputs((text(9), text(5, 1)))
    assert whole.seen(3, 2).tolist() == [[0, 14]] * 2 and whole.tokens_within(0, 1) is None and whole.parts(0, 99) == 1
    assert set(both.extras(4)) == {0, 1} and both.extras(4)[1] != whole.extras(4).get(1)
    assert whole.digest == both.digest and whole.digest != CrossInputs((text(5, 1), text(9))).digest


def test_encoder_input_identity():
    """Token ids are compared themselves, arrays by a hash other than the digest's. Everything the encoder reads
    counts.
    """
    assert text(9).values.astype("<i4").tobytes() in text(9).identity
    array = np.ones((1, 2, 3), np.float32)
    kinds = [
        EncoderInput("image", array, 5),
        EncoderInput("image", array, 5, num_positions=3),
        EncoderInput("image", array, 6),
        EncoderInput("image", array, 5, numbers=np.array([[1]])),
        EncoderInput("image", 2 * array, 5),
        EncoderInput("audio", array, 5),
        EncoderInput("image", array.reshape(2, 1, 3), 5),
    ]
    assert len({one.digest for one in kinds}) == len({one.identity for one in kinds}) == len(kinds)
    assert max(len(one.identity) for one in kinds) < 200
