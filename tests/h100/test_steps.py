"""The engine's steps compiled for H100s, with none present: the cache stays in place, layers have two all-reduces."""

from collections import Counter
from functools import cache

import pytest
from support.lowering import MEDIUM, Compiled, abstract_model, compile_step, h100_mesh, require_cuda_compiler

from jaxinfer.engine.batch import Bucket
from jaxinfer.engine.steps import Shapes
from jaxinfer.engine.sampler import Level

pytestmark = [pytest.mark.xdist_group("h100"), pytest.mark.usefixtures("cuda_compiler")]

ROWS, POSITIONS, BLOCK, CHUNK = 8, 1024, 16, 512
WIDTH = POSITIONS // BLOCK
SHAPES = Shapes(
    # Twice what the rows can hold, so that what attention gathers is not mistaken for the cache.
    num_blocks=2 * ROWS * WIDTH, block_size=BLOCK, rows=ROWS, width=WIDTH, decode_buckets=(ROWS,),
    prefill_buckets=(CHUNK,), prefill_rows=ROWS, max_logprobs=5, max_length=POSITIONS, sampled_vocab=32000,
)  # fmt: skip


@pytest.fixture(scope="module")
def cuda_compiler() -> None:
    require_cuda_compiler()


@cache
def step(kind: str, layers: int, tp: int = 1, level: Level = Level.GREEDY) -> Compiled:
    program, params = abstract_model(MEDIUM | {"num_hidden_layers": layers}, h100_mesh(tp))
    tokens = ROWS if kind == "decode" else CHUNK
    return compile_step(program, params, SHAPES, Bucket(kind, tokens, ROWS, WIDTH, level, -1))


def check_in_place(compiled: Compiled) -> None:
    assert compiled.aliased_bytes >= compiled.cache_bytes
    assert compiled.large_copies == []


def test_a_decode_step_of_16_layers_updates_the_cache_in_place_in_little_memory():
    compiled = step("decode", 16)
    check_in_place(compiled)
    assert compiled.temporary_bytes < 64 << 20
    assert compiled.collectives == Counter()


@pytest.mark.parametrize("layers", [2, pytest.param(16, marks=pytest.mark.slow)])
def test_a_prefill_step_updates_the_cache_in_place(layers: int):
    compiled = step("prefill", layers)
    check_in_place(compiled)
    assert compiled.temporary_bytes < 64 << 20
    assert compiled.collectives == Counter()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_step_with_every_sampler_setting_updates_cache_and_histories_in_place(kind: str):
    compiled = step(kind, 2, level=Level.EDITED)
    histories, biases = 4 * ROWS * POSITIONS, 4 * ROWS * SHAPES.sampled_vocab
    assert compiled.aliased_bytes >= compiled.cache_bytes + histories + biases
    assert compiled.large_copies == []


# With 8 shards the 4 kv heads are held twice.
@pytest.mark.parametrize(
    ("kind", "tp"),
    [("decode", 8), *(pytest.param(*case, marks=pytest.mark.slow) for case in
                      [("decode", 4), ("prefill", 4), ("prefill", 8)])],
)  # fmt: skip
def test_a_layer_has_two_all_reduces_and_nothing_else(kind: str, tp: int):
    two, three = step(kind, 2, tp), step(kind, 3, tp)
    check_in_place(three)
    assert three.collectives - two.collectives == Counter({"all-reduce": 2})
    # Beside the layers: the embedding's rows are added up, and each shard's best token is compared.
    assert two.collectives == Counter({"all-reduce": 2 * 2 + 1, "all-gather": 1})
