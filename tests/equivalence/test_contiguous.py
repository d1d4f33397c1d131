"""A contiguous cache gives the same tokens as a paged one, for all host settings and lengths."""

from functools import cache

import numpy as np
import pytest
from support import cross
from support.cases import EDGES, GREEDY, alone, mixed, poison
from support.tiny import (
    ARCHITECTURES,
    CHUNK,
    CONFIG,
    HYBRIDS,
    LENGTH,
    ROWS,
    VOCAB,
    config,
    hybrid_runner,
    joint_runner,
    make_engine,
    make_request,
    prompt,
    random_runner,
    run,
    shapes,
    shapes_of,
)

from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.functional import split
from jaxinfer.inputs.defaults import ModelLimits, resolve
from jaxinfer.loading import weights
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.slow

MODELS = [
    pytest.param(name, marks=pytest.mark.xdist_group(name))
    for name in ("llama", "five to one", "all sliding", "gpt_oss", "deepseek_v3", "kimi_linear")
]
"""A model for each kind of layer; other differences between families do not depend on the cache."""
MOST = [model for model in MODELS if model.values[0] in ("llama", "five to one")]


@cache
def runners(name):
    """Runners of one model with a paged and with a contiguous cache."""
    paged = random_runner(name) if name in ARCHITECTURES else hybrid_runner(name)
    return paged, Runner(paged.program, paged.params, shapes_of(paged.program, contiguous=True))


def forks(n=3):
    params = SamplingParams(temperature=0.3, seed=11, max_tokens=10, n=n)
    return [make_request(f"fork {i}", prompt(length, i), params) for i, length in enumerate(EDGES)]


@pytest.mark.parametrize("name", MODELS)
def test_contiguous_is_paged(name):
    """Prompts in chunks, more requests than rows, one with a long output; run twice, the second time over used rows."""
    paged, contiguous = runners(name)
    many = SamplingParams(temperature=0, max_tokens=50)

    def wanted():
        return [*mixed(EDGES), make_request("long", prompt(70, 5), many), *forks()[-2:]]

    expected = alone(paged, wanted())
    poison(contiguous)
    engine = make_engine(contiguous)
    assert run(engine, wanted()) == expected
    assert run(engine, wanted()) == expected
    assert engine.scheduler.preempted == 0


@pytest.mark.xdist_group("llama")
def test_joint_steps():
    paged, contiguous = runners("llama")
    poison(contiguous)
    assert run(make_engine(joint_runner(contiguous)), mixed(EDGES)) == alone(paged, mixed(EDGES))
    assert any(getattr(key, "decodes", 0) for key in contiguous.programs.seconds)


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("host", [dict(budget=5), dict(decode_steps=8), dict(block_sharing=False)])
def test_forks_copy_or_compute_again(name, host):
    paged, contiguous = runners(name)
    expected = alone(paged, forks())
    poison(contiguous)
    assert run(make_engine(contiguous, **host), forks()) == expected
    assert any(len({tuple(tokens) for tokens in samples}) > 1 for samples in expected)


@pytest.mark.xdist_group("llama")
def test_contiguous_forks_copy_their_blocks_once():
    engine = make_engine(runners("llama")[1])
    request = make_request("all", prompt(CHUNK - 1), SamplingParams(temperature=0.3, seed=1, n=4, max_tokens=10))
    engine.add(request)
    engine.step()
    plan = engine.scheduler.schedule()
    assert len(plan.copies[0]) == 3 * 4, "three forks of four blocks"
    assert len(set(plan.copies[1].tolist()) | set(plan.copies[0].tolist())) == 16


@pytest.mark.xdist_group("llama")
def test_rows_grow_through_several_read_lengths():
    """With XLA's attention, compiled for a read length: a step with a larger one is used once a row needs it, not
    earlier.
    """
    mesh = make_mesh(1)
    hf = config("llama") | dict(max_position_embeddings=1024)
    program, params = split(weights.random(hf, mesh), mesh, attention_kernel="xla")
    sizes = dict(block_size=32, width=18, max_length=576, num_blocks=ROWS * 18, prefill_buckets=(64,))
    paged = Runner(program, params, shapes(**sizes))
    contiguous = Runner(program, params, shapes(**sizes, contiguous=True))
    params = SamplingParams(temperature=0, max_tokens=60)

    def wanted(lengths):
        texts = [np.array(prompt(n, i), np.int32) for i, n in enumerate(lengths)]
        own = [resolve(params, ModelLimits(VOCAB, 576), prompt_len=len(text)) for text in texts]
        return [
            Request(id=str(i), prompt=text, params=one, limit=len(text) + 60, seed=0)
            for i, (text, one) in enumerate(zip(texts, own, strict=True))
        ]

    def widths():
        keys = [key for key in contiguous.programs.seconds if isinstance(key, Bucket) and key.kind == "decode"]
        return sorted(key.width for key in keys)

    lengths = (5, 100, 40, 230, 490)
    expected = run(make_engine(paged, budget=64), wanted(lengths))
    poison(contiguous)
    engine = make_engine(contiguous, budget=64)
    for so_far, wanted_widths in ((1, [4]), (3, [4, 8]), (4, [4, 8, 16]), (5, [4, 8, 16, 18])):
        assert run(engine, wanted(lengths)[:so_far]) == expected[:so_far]
        assert widths() == wanted_widths


@pytest.mark.xdist_group("five to one")
def test_divided_over_devices():
    mesh = make_mesh(2)
    program, params = split(weights.random(CONFIG | HYBRIDS["five to one"], mesh), mesh)
    two = Runner(program, params, shapes_of(program, contiguous=True))
    paged = Runner(program, params, shapes_of(program))
    assert run(make_engine(two), mixed(EDGES)) == run(make_engine(paged), mixed(EDGES))


@pytest.mark.xdist_group("llama")
def test_an_aborted_request_leaves_its_row():
    _, contiguous = runners("llama")
    engine = make_engine(contiguous)
    request = make_request("all", prompt(9), SamplingParams(temperature=0.3, seed=1, n=3, max_tokens=30))
    other = make_request("other", prompt(20), GREEDY)
    for one in (request, other):
        engine.add(one)
    for _ in range(2):
        engine.step()
    engine.abort("all")
    while engine.has_work:
        engine.step()
    assert engine.manager.pool.num_held == 0 and other.sequences[0].finish_reason == "length"


@pytest.mark.xdist_group("cross")
def test_contiguous_rows_store_encoder_keys_and_values():
    """Encoder keys and values are computed per request and copied by forks, while a paged cache shares them."""
    paged = cross.cross_runner()
    program = paged.program
    contiguous = Runner(program, paged.params, shapes_of(program, contiguous=True, cross_buckets=cross.UNITS))
    params = SamplingParams(temperature=0.3, seed=11, max_tokens=12, n=3)

    def wanted():
        return [cross.cross_request(str(i), cross.text(n, i // 2), params) for i, n in enumerate((33, 33, 5, LENGTH))]

    expected = cross.alone(wanted())
    poison(contiguous)
    engine = make_engine(contiguous)
    assert run(engine, wanted()) == expected
    assert engine.metrics.counters["encoder_inputs"] >= 4
    assert any(len({tuple(tokens) for tokens in samples}) > 1 for samples in expected)
