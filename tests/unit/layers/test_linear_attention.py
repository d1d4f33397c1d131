"""KDA, gated DeltaNet and Mamba-2 against transformers' layers, fused and separate, over several devices."""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference; it comes with the extra `test`")

from flax import nnx
from support import linear_attention as support
from support.linear_attention import KDA, MAMBA, NET, SLOTS
from support.lowering import collectives

from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.kernels.state.slots import DecodeSlots, Segments
from jaxinfer.layers.params import Build
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.xdist_group("linear attention")

T, B, NO_SLOT = 48, 4, 99
LENGTHS = (29, 3, 16)
kinds = pytest.mark.parametrize("kind", [KDA, NET, MAMBA])


def inputs(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(length, support.M)).astype(np.float32)


SEQUENCES = [inputs(length + 7, seed) for seed, length in enumerate(LENGTHS)]


def run(made: nnx.Module, tp: int = 1) -> list[np.ndarray]:
    """Compute outputs `[T, M]` of all sequences, batched: two steps of chunks, then seven of single tokens."""
    graph, params = nnx.split(made)
    state = support.empty(made, make_mesh(tp))
    found: list[list[np.ndarray]] = [[] for _ in SEQUENCES]
    done = [0] * len(SEQUENCES)
    for sizes in ((10, 2, 16), (19, 1, 0)):
        counts = np.array([*sizes, 0])
        starts = np.cumsum(counts) - counts
        x = np.full((T, support.M), 7, np.float32)
        for row, count in enumerate(sizes):
            x[starts[row] : starts[row] + count] = SEQUENCES[row][done[row] : done[row] + count]
        slots = np.array([4, 0, 2, 1])
        sources = np.where(np.array([*done, 0]) > 0, slots, NO_SLOT)
        y, state = support.step(graph, params, x, state, Segments(starts, counts, sources, slots, np.zeros(4, bool)))
        for row, count in enumerate(sizes):
            found[row].append(np.asarray(y[starts[row] : starts[row] + count]))
            done[row] += count
    for _ in range(7):
        x = np.full((B, support.M), 7, np.float32)
        x[[0, 2, 3]] = [sequence[at] for sequence, at in zip(SEQUENCES, done, strict=True)]
        y, state = support.step(graph, params, x, state, DecodeSlots(*[np.array([4, NO_SLOT, 0, 2])] * 2))
        for row, position in enumerate((0, 2, 3)):
            found[row].append(np.asarray(y[position : position + 1]))
            done[row] += 1
    assert np.isnan(np.asarray(state.recurrent)[[1, 3, 5]]).all(), "unused slots stay unchanged"
    return [np.concatenate(parts) for parts in found]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[np.ndarray]]:
    return {kind: [support.expected(kind, sequence) for sequence in SEQUENCES] for kind in (KDA, NET, MAMBA)}


def close(found: list[np.ndarray], expected: list[np.ndarray], atol: float = 1e-4) -> None:
    for one, other in zip(found, expected, strict=True):
        assert np.abs(other).max() > 1
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


@kinds
@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_a_layer_equals_that_of_transformers(kind, tp, expected):
    close(run(support.layer(kind, tp), tp), expected[kind])


@pytest.mark.slow
@kinds
def test_a_replicated_layer_equals_that_of_transformers(kind, expected):
    close(run(support.layer(kind, 2, placement={"layer": "replicate"}), 2), expected[kind])


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
@kinds
def test_separate_projections_give_the_same_result(kind, tp, expected):
    apart = run(support.layer(kind, tp, fused=False), tp)
    close(apart, expected[kind])
    close(apart, run(support.layer(kind, tp), tp), atol=2e-5)


def test_both_tensor_namings_of_kimi_linear_load_the_same_layer():
    found, other = (nnx.split(support.layer(KDA, 2, hub=hub))[1] for hub in (True, False))
    jax.tree.map(np.testing.assert_array_equal, found, other)


@pytest.mark.parametrize("lost", ["a.k_conv1d.weight", "a.g_a_proj.weight", "a.f_b_proj.weight"])
def test_a_missing_part_of_a_fused_projection_is_named(lost, monkeypatch):
    content = support.tensors(KDA, hub=True)
    del content[lost]
    monkeypatch.setattr(support, "tensors", lambda *_: content)
    with pytest.raises(CheckpointError, match=lost):
        support.layer(KDA)


@pytest.mark.slow
@kinds
def test_int8_stays_fused_and_close(kind, expected):
    made = [run(support.layer(kind, tp, quantization="int8"), tp) for tp in (1, 2)]
    apart = run(support.layer(kind, 1, quantization="int8", fused=False))
    for found in (*made, apart):
        for one, other in zip(found, expected[kind], strict=True):
            assert 0 < np.linalg.norm(one - other) / np.linalg.norm(other) < 0.1
    close(apart, made[0], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("tp", [2, 4])
@kinds
def test_the_only_collectives_are_those_declared(kind, tp, fused):
    """The all-reduce of the output, and that of a norm whose columns are on several shards: Mamba's two groups."""
    made = support.layer(kind, tp, fused=fused)
    assert len(getattr(made, "collectives", list)()) == (kind == MAMBA and tp == 4)
    graph, params = nnx.split(made)
    state = support.empty(made, make_mesh(tp))
    segments = Segments(*(np.zeros(B, np.int32) for _ in range(4)), np.zeros(B, bool))
    for count, rows in ((B, DecodeSlots(np.arange(B), np.arange(B))), (T, segments)):
        x = np.zeros((count, support.M), np.float32)
        compiled = support.step.lower(graph, params, x, state, rows).compile()
        assert collectives(compiled.as_text()) == Counter({"all-reduce": 1 + (kind == MAMBA and tp == 4)})
        assert compiled.memory_analysis().alias_size_in_bytes >= state.recurrent.nbytes // tp


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_six_projections_are_one_gemm_and_the_two_low_rank_ones_another(quantization):
    def products(fused: bool) -> int:
        made = support.layer(KDA, fused=fused, quantization=quantization)
        graph, params = nnx.split(made)
        state, rows = support.empty(made, make_mesh()), DecodeSlots(np.arange(B), np.arange(B))
        traced = support.step.trace(graph, params, np.zeros((B, support.M), np.float32), state, rows)
        return str(traced.jaxpr).count("dot_general[")

    rotations = 2 if quantization == "int8" else 1  # an int8 product comes with a rotation of its rows
    assert products(False) - products(True) == ((6 + 2) - (1 + 1)) * rotations


@kinds
def test_heads_that_do_not_divide_are_an_error(kind):
    build = Build(nnx.Rngs(0), np.dtype("float32"), make_mesh(3), pad_heads=True)
    with pytest.raises(ConfigError, match=r"layer.*4 heads.*axis 'model' of size 3.*\(1, 2, 4\)"):
        nnx.eval_shape(lambda: support.Holder(build, kind))


def test_bytes_of_a_state_slot():
    """Kimi-Linear 48B: 2 MiB and 72 KiB per layer."""
    spec = support.DeltaSpec(2304, 32, 128, 32, 128, 4, 1e-5)
    kept = spec.cache_spec(jax.numpy.dtype("bfloat16"), False)
    assert [np.prod(a.shape) * a.dtype.itemsize for a in kept.arrays] == [2 << 20, 72 << 10]
    assert kept.slot_bytes(4) == (2 << 20) + (72 << 10) == replace(kept, replicated=True).slot_bytes(4) / 4
    assert len(SEQUENCES) < SLOTS
