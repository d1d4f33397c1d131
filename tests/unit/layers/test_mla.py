"""Multi-head latent attention against transformers' layers: expanded in prefill, absorbed in decode."""

from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference; it comes with the extra `test`")

from flax import nnx
from support.linear_attention import Arrays
from support.lowering import collectives
from transformers import DeepseekV3Config, KimiLinearConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention

from jaxinfer import functional
from jaxinfer.checkpoint import rules
from jaxinfer.kernels.attention import latent
from jaxinfer.kernels.attention.paged import DecodeRows, KVCache, PrefillTiles, Slots
from jaxinfer.layers import mla
from jaxinfer.layers.attention import GroupStep, StepContext
from jaxinfer.layers.mla import LatentAttention, LatentSpec
from jaxinfer.layers.params import Build
from jaxinfer.layers.rope import cos_sin
from jaxinfer.layers.rope_config import RopeConfig
from jaxinfer.models.mla_rules import mla_rules
from jaxinfer.sharding import make_mesh

pytestmark = [pytest.mark.xdist_group("linear attention"), pytest.mark.slow]

M, H, RANK, DN, R, DV = 32, 4, 24, 16, 8, 12
BLOCK, BLOCKS, WIDTH, ROWS, T = 4, 40, 12, 4, 48
KIMI, DEEPSEEK = "kimi", "deepseek"
SHAPE = dict(
    hidden_size=M,
    num_attention_heads=H,
    num_key_value_heads=H,
    kv_lora_rank=RANK,
    qk_nope_head_dim=DN,
    qk_rope_head_dim=R,
    v_head_dim=DV,
    num_hidden_layers=1,
    attn_implementation="eager",
)
SPEC = LatentSpec(M, H, RANK, DN, R, DV, (DN + R) ** -0.5)
SPECS = {
    KIMI: SPEC,
    DEEPSEEK: LatentSpec(M, H, RANK, DN, R, DV, SPEC.scale, query_rank=20, interleaved=True, bias=True),
}
ROPE = RopeConfig("default", 10000.0, R, R, 4096)
LENGTHS = (29, 3, 16)
SEQUENCES = [
    np.random.default_rng(seed).normal(size=(length + 5, M)).astype(np.float32) for seed, length in enumerate(LENGTHS)
]
kinds = pytest.mark.parametrize("kind", [KIMI, DEEPSEEK])


@cache
def reference(kind: str) -> torch.nn.Module:
    """Make transformers' layer with random weights and activations of order one."""
    if kind == KIMI:
        made = KimiLinearAttention(KimiLinearConfig(**SHAPE, q_lora_rank=None), 0)
    else:
        config = DeepseekV3Config(**SHAPE, q_lora_rank=20, attention_bias=True, max_position_embeddings=4096)
        made = DeepseekV3Attention(config, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in made.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            plain = value.ndim == 1
            value.copy_(
                1 + 0.4 * noise if "norm" in name else 0.5 * noise if plain else 2 * value.shape[1] ** -0.5 * noise
            )
    return made.float().eval()


@cache
def expected(kind: str) -> list[np.ndarray]:
    """Compute each sequence's outputs in transformers, in one pass."""
    layer, found = reference(kind), []
    for sequence in SEQUENCES:
        x, count = torch.from_numpy(sequence)[None], len(sequence)
        mask = torch.full((1, 1, count, count), -torch.inf).triu(1)
        how = {}
        if kind == DEEPSEEK:
            how["position_embeddings"] = DeepseekV3RotaryEmbedding(layer.config)(x, torch.arange(count)[None])
        with torch.no_grad():
            found.append(layer(hidden_states=x, attention_mask=mask, **how)[0][0].numpy())
    return found


class Holder(nnx.Module):
    def __init__(self, build: Build, spec: LatentSpec):
        self.layer = LatentAttention(build.at("layer"), spec)


def layer(kind: str, tp: int = 1, quantization: str | None = None) -> LatentAttention:
    """Make our layer with the reference's weights, read by the real loader."""
    mesh, spec = make_mesh(tp), SPECS[kind]
    holder = nnx.eval_shape(lambda: Holder(Build(nnx.Rngs(0), jnp.dtype("float32"), mesh, quantization), spec))
    tensors = Arrays({f"a.{name}": value.numpy() for name, value in reference(kind).state_dict().items()})
    table = mla_rules("a", "layer", query_rank=spec.query_rank is not None, bias=spec.bias)
    rules.load(holder, table, tensors, mesh, progress=False)
    return holder.layer


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def step(
    graph: nnx.GraphDef, params: nnx.State, x: jax.Array, kv_cache: KVCache, context: StepContext
) -> tuple[jax.Array, KVCache]:
    module = nnx.merge(graph, params)
    rope = cos_sin(ROPE, context.positions, context.rope_lengths) if module.spec.interleaved else None
    return module(x, kv_cache, rope, context)


TABLES = np.random.default_rng(5).permutation(BLOCKS)[: 3 * WIDTH].reshape(3, WIDTH).astype(np.int32)
"""Block tables of the three sequences, disjoint."""


def context(positions: np.ndarray, own: np.ndarray, rows: DecodeRows | PrefillTiles, tp: int, tile: int) -> StepContext:
    """Make a step from positions `[T]`, -1 for padding, and each token's table row `own` `[T]`."""
    at = np.maximum(positions, 0)
    slots = Slots(np.where(positions >= 0, TABLES[own, at // BLOCK], BLOCKS), at % BLOCK)
    arrays = jax.tree.map(jnp.asarray, (at, positions >= 0, at + 1, (GroupStep(slots, rows),)))
    return StepContext(*arrays, mesh=make_mesh(tp), tile=tile)


def prefill_step(sizes: tuple[int, ...], done: list[int], tp: int, tile: int = 8) -> StepContext:
    chunks = [(np.zeros(size, np.int32), start, start + size) for size, start in zip(sizes, done, strict=True)]
    batch = functional.prefill_batch(chunks, TABLES, tokens=T, rows=ROWS, tile=tile)
    return context(batch.positions, batch.rows, PrefillTiles(batch.tables, batch.tiles, batch.count), tp, tile)


def run(made: LatentAttention, tp: int = 1) -> list[np.ndarray]:
    """Compute the outputs of all sequences, batched: two prefill steps, then five decode steps."""
    graph, params = nnx.split(made)
    whole = jax.sharding.NamedSharding(make_mesh(tp), jax.sharding.PartitionSpec())
    kv_cache = KVCache(jax.device_put(np.full((BLOCKS, 1, BLOCK, SPEC.latent_width), np.nan, np.float32), whole), None)
    found: list[list[np.ndarray]] = [[] for _ in SEQUENCES]
    done = [0] * len(SEQUENCES)
    for sizes in ((10, 2, 16), (19, 1, 0)):
        x, start = np.full((T, M), 7, np.float32), 0
        for row, size in enumerate(sizes):
            x[start : start + size] = SEQUENCES[row][done[row] : done[row] + size]
            start += size
        y, kv_cache = step(graph, params, x, kv_cache, prefill_step(sizes, done, tp))
        assert np.isfinite(y).all(), "padding must be finite"
        for row, part in enumerate(np.split(np.asarray(y), np.cumsum(sizes))[:3]):
            found[row].append(part)
            done[row] += len(part)
    for _ in range(5):
        x, positions = np.full((ROWS, M), 7, np.float32), np.array([*done, -1])
        x[:3] = [sequence[at] for sequence, at in zip(SEQUENCES, done, strict=True)]
        rows = DecodeRows(np.concatenate([TABLES, TABLES[:1]]), positions + 1)
        y, kv_cache = step(graph, params, x, kv_cache, context(positions, np.array([0, 1, 2, 0]), rows, tp, 1))
        for row in range(3):
            found[row].append(np.asarray(y[row : row + 1]))
            done[row] += 1
    return [np.concatenate(parts) for parts in found]


@pytest.fixture(params=[256, 6])
def turns(request, monkeypatch):
    """Set keys and queries per iteration, for one or many iterations."""
    monkeypatch.setattr(latent, "KEYS", request.param)
    monkeypatch.setattr(latent, "QUERIES", request.param)
    step.clear_cache()
    yield
    step.clear_cache()


@kinds
def test_a_layer_equals_that_of_transformers(kind, turns):
    for one, other in zip(run(layer(kind)), expected(kind), strict=True):
        assert np.abs(other).max() > 1
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


@kinds
def test_absorbed_prefill_gives_the_same_result(kind, monkeypatch):
    """As with the Triton kernel."""
    monkeypatch.setattr(mla, "EXPANDING", frozenset())
    step.clear_cache()
    for one, other in zip(run(layer(kind)), expected(kind), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
    step.clear_cache()


@pytest.mark.parametrize("tp", [2, 4])
@kinds
def test_several_devices_give_the_same_result(kind, tp):
    for one, other in zip(run(layer(kind, tp), tp), expected(kind), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tp", [1, 2])
@kinds
def test_int8_is_close(kind, tp):
    for one, other in zip(run(layer(kind, tp, "int8"), tp), expected(kind), strict=True):
        assert 0 < np.linalg.norm(one - other) / np.linalg.norm(other) < 0.1


@kinds
def test_the_only_collective_is_the_all_reduce_of_the_output(kind):
    graph, params = nnx.split(layer(kind, 2))
    kv_cache = KVCache(jnp.zeros((BLOCKS, 1, BLOCK, SPEC.latent_width)), None)
    rows = DecodeRows(np.zeros((ROWS, WIDTH), np.int32), np.ones(ROWS, np.int32))
    own = np.zeros(ROWS, np.int32)
    for count, given in ((T, prefill_step((3, 2, 0), [0, 0, 0], 2)), (ROWS, context(own, own, rows, 2, 1))):
        leaves, tree = jax.tree.flatten(given)
        flat = jax.jit(
            lambda p, x, kv_cache, leaves, tree=tree: step(graph, p, x, kv_cache, jax.tree.unflatten(tree, leaves))
        )
        compiled = flat.lower(params, jnp.zeros((count, M)), kv_cache, leaves).compile()
        assert collectives(compiled.as_text()) == Counter({"all-reduce": 1})


def test_nan_stays_in_its_sequence():
    rng = np.random.default_rng(0)
    q, latents = rng.normal(size=(T, H, DN + R)), rng.normal(size=(T, RANK + R))
    expansion = latent.Expansion(*(rng.normal(size=(H, dim, RANK)).astype(np.float32) for dim in (DN, DV)))
    kv_cache = KVCache(rng.normal(size=(BLOCKS, 1, BLOCK, RANK + R)).astype(np.float32), None)
    given = prefill_step((10, 2, 16), [8, 4, 0], 1)
    prefill = jax.jit(partial(latent.prefill, scale=0.3))

    def attend(latents: np.ndarray) -> np.ndarray:
        arrays = q.astype(np.float32), latents.astype(np.float32)
        return np.asarray(prefill(*arrays, kv_cache, given.slots, given.rows, expansion)[0])

    whole = attend(latents)
    latents[11] = np.nan  # the second sequence
    found = attend(latents)
    assert np.isnan(found[11]).all()
    np.testing.assert_array_equal(found[[*range(10), *range(12, 28)]], whole[[*range(10), *range(12, 28)]])
