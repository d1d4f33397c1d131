"""Models with cross-attention: sharing, finding or losing encoder keys and values does not change tokens."""

import numpy as np
import pytest
from support.cases import GREEDY, SEEDED
from support.cross import START, again, alone, blocks, count, cross_request, cross_runner, text
from support.tiny import BLOCK, CHUNK, LENGTH, make_engine, prompt, run

from jaxinfer.checkpoint.rules import parameters
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.media import CrossInputs
from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("cross")

LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK + 1, 33, LENGTH)
"""Lengths of encoder texts: around block ends, beyond a small encoder step, the maximum."""
STARTS = (1, 1, BLOCK, CHUNK + 3)
"""Lengths of decoder prompts."""


def mixed() -> list[Request]:
    """Greedy and seeded requests of all lengths, each with its own text."""
    return [
        cross_request(
            str(i), text(length, i), (GREEDY, SEEDED)[i % 2], [START, *prompt(STARTS[i % len(STARTS)] - 1, 40 + i)]
        )
        for i, length in enumerate(LENGTHS)
    ]


def settled(engine: Engine) -> None:
    """Assert that nothing is held when all requests have finished, and that the accounting holds."""
    assert int(engine.manager.pool.num_held) == 0
    engine.manager.check()


@pytest.mark.parametrize("budget", [3, CHUNK])
def test_batched_and_in_chunks_is_alone(budget: int):
    engine = make_engine(cross_runner(), budget=budget)
    expected = alone(mixed())
    assert run(engine, mixed()) == expected
    assert len({str(samples) for samples in expected}) == len(LENGTHS), "tokens do not depend on the encoder inputs"
    assert count(engine, "encoder_inputs") == len(LENGTHS)
    settled(engine)


def test_a_text_that_several_requests_read_is_encoded_once():
    read = text(33)
    params = SamplingParams(temperature=0.5, seed=0, max_tokens=10)
    wanted = [cross_request(str(i), text(33), params, seed=i) for i in range(5)]
    expected = alone(wanted)
    engine = make_engine(cross_runner())
    for request in wanted:
        engine.add(request)
    engine.step()
    assert count(engine, "encoder_inputs") == 1 and count(engine, "mm_cache_hits") == 4
    spans = {tuple(engine.manager.tables.blocks[-1, s.row, : blocks(read.length)]) for r in wanted for s in r.sequences}
    assert len(spans) == 1 and int(engine.manager.pool.num_held) == blocks(33) + 5
    while engine.has_work:
        engine.step()
    assert [[s.output_ids.tolist() for s in r.sequences] for r in wanted] == expected
    assert len({str(samples) for samples in expected}) > 1, "the seeds make no difference"
    settled(engine)


@pytest.mark.parametrize("host", [{}, {"block_sharing": False}, {"prefix_caching": False}])
def test_samples_of_one_text(host: dict[str, bool]):
    """Eight samples need one run of the encoder and one set of blocks."""
    params = SamplingParams(temperature=0.3, seed=11, max_tokens=12, n=8)
    expected = alone([cross_request("0", text(33), params)])
    engine, request = make_engine(cross_runner(), **host), cross_request("0", text(33), params)
    engine.add(request)
    held = []
    while engine.has_work:
        engine.step()
        held.append(
            len({i for s in request.sequences if s.row >= 0 for i in engine.manager.tables.blocks[-1, s.row] if i >= 0})
        )
    assert [[s.output_ids.tolist() for s in request.sequences]] == expected
    assert len({str(tokens) for tokens in expected[0]}) > 1
    assert count(engine, "encoder_inputs") == 1 and max(held) == blocks(33)
    settled(engine)


def test_a_sample_is_a_lone_run_with_its_seed_and_index():
    params = SamplingParams(temperature=0.3, seed=7, max_tokens=10, n=4)
    [samples] = run(make_engine(cross_runner()), [cross_request("all", text(18), params)])
    for index, tokens in enumerate(samples):
        lone = cross_request("lone", text(18), params)
        lone.sequences = [lone.sequences[index]]
        assert run(make_engine(cross_runner()), [lone]) == [[tokens]]


@pytest.mark.parametrize("caching", [True, False])
def test_preempted_and_computed_again(caching: bool):
    params = SamplingParams(temperature=0, max_tokens=3 * BLOCK)
    wanted = [cross_request(str(i), text(9 + i, i), params) for i in range(6)]
    expected = alone(wanted)
    engine = make_engine(cross_runner(), pool_blocks=14, prefix_caching=caching)
    assert run(engine, wanted) == expected
    assert engine.scheduler.preempted > 0
    settled(engine)


def test_a_preempted_request_finds_its_blocks():
    request = cross_request("0", text(33), GREEDY)
    expected = alone([request])
    engine = make_engine(cross_runner())
    engine.add(request)
    for _ in range(4):
        engine.step()
    engine.settle()
    engine.scheduler.preempt(request.sequences[0])
    while engine.has_work:
        engine.step()
    assert [[request.sequences[0].output_ids.tolist()]] == expected
    assert count(engine, "encoder_inputs") == 1 and count(engine, "mm_cache_hits") == 1


def test_a_text_is_found_until_it_is_evicted():
    engine = make_engine(cross_runner(), pool_blocks=20)
    expected = alone([cross_request("0", text(33), GREEDY)])
    for runs in (1, 1):
        assert run(engine, [cross_request("0", text(33), GREEDY)]) == expected
        assert count(engine, "encoder_inputs") == runs
    run(engine, [cross_request("1", text(40, 9), GREEDY)])
    assert run(engine, [cross_request("0", text(33), GREEDY)]) == expected
    assert count(engine, "encoder_inputs") == 3
    engine.reset_prefix_cache()
    assert run(engine, [cross_request("0", text(33), GREEDY)]) == expected
    assert count(engine, "encoder_inputs") == 4
    settled(engine)


def test_decoder_prefixes_depend_on_the_encoder_inputs():
    long = [START, *prompt(3 * BLOCK, 5)]
    engine = make_engine(cross_runner())
    wanted = [cross_request(str(i), read, GREEDY, long) for i, read in enumerate((text(9), text(9, 1), text(9)))]
    expected = alone(wanted)
    assert [run(engine, [request])[0] for request in wanted] == expected and expected[0] != expected[1]
    assert [request.cached_tokens for request in wanted] == [0, 0, 3 * BLOCK]


def test_another_salt_finds_nothing():
    engine = make_engine(cross_runner())
    for i, salt in enumerate((b"a", b"b", b"a")):
        run(engine, [cross_request(str(i), text(9), GREEDY, salt=salt)])
    assert count(engine, "encoder_inputs") == 2


def test_a_digest_that_collides_is_a_miss():
    """Content is compared: for another text with the same digest neither encoder positions nor decoder blocks are
    reused.
    """
    one, other = CrossInputs((text(9),)), CrossInputs((text(9, 1),))
    object.__setattr__(other, "digest", one.digest)
    long = [START, *prompt(2 * BLOCK, 5)]
    wanted = [cross_request(str(i), read, GREEDY, long) for i, read in enumerate((one, other))]
    expected = alone(wanted)
    engine = make_engine(cross_runner())
    assert [run(engine, [request])[0] for request in wanted] == expected and expected[0] != expected[1]
    assert count(engine, "encoder_inputs") == 2 and wanted[1].cached_tokens == 0
    settled(engine)


def test_tokens_see_their_range_only():
    """Of two concatenated texts only one is visible, which gives the same tokens as that text alone."""
    one, other, long = text(9), text(14, 1), [START, *prompt(CHUNK + 2, 6)]
    both = CrossInputs((one, other), ((0, 0, 9),))
    last = CrossInputs((other, one), ((0, 14, 23),))
    expected = alone([cross_request("0", one, GREEDY, long)])[0]
    for budget in (5, CHUNK):
        wanted = [cross_request(str(i), read, GREEDY, long) for i, read in enumerate((both, last, one))]
        assert run(make_engine(cross_runner(), budget=budget), wanted) == [expected] * 3


def test_ranges_are_cut_anywhere():
    """In chunks, in a batch and with prefix hits as in one step; before the first range nothing is visible."""
    one, other = text(9), text(14, 1)
    ranges = ((2, 0, 9), (3, 0, 23), (9, 9, 23), (BLOCK * 3, 0, 0), (CHUNK + 1, 0, 9))
    long = [START, *prompt(CHUNK + 4, 6)]
    wanted = [
        cross_request(str(i), CrossInputs((one, other), ranges[first:]), GREEDY, long)
        for i, first in enumerate((0, 1, 2, 4))
    ]
    expected = alone(wanted)
    assert len({str(samples) for samples in expected}) > 2
    for budget in (1, 5, CHUNK):
        engine = make_engine(cross_runner(), budget=budget)
        assert run(engine, [again(r, str(i)) for i, r in enumerate(wanted * 2)]) == expected * 2
        settled(engine)


def test_a_request_without_encoder_inputs():
    """In a batch with requests that have encoder inputs; neither affects the other."""
    wanted = [
        cross_request("0", text(9), GREEDY),
        cross_request("1", None, GREEDY),
        cross_request("2", text(9, 1), GREEDY),
    ]
    expected = alone(wanted)
    assert run(make_engine(cross_runner()), wanted) == expected
    assert len({str(samples) for samples in expected}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
def test_cross_attention_over_several_devices(tp: int):
    single, several = cross_runner(), cross_runner(tp)
    assert run(make_engine(several), mixed()) == alone(mixed(), single)


@pytest.mark.slow
def test_int8_weights():
    """Quantised layers give the same in any batch, and nearly the same as unquantised ones."""
    runner = cross_runner(quantization="int8")
    assert run(make_engine(runner), mixed()) == alone(mixed(), runner)
    module = runner.program.module(runner.params)
    kinds = {path for path, param in parameters(module).items() if param.dtype == np.int8}
    assert {"decoder.layers.0.cross.qkv.q.weight", "decoder.layers.0.cross.qkv.kv.weight"} <= kinds
