"""int8 modules: close to float32, equal over any number of devices, without extra collectives."""

from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import checkpoint
from support.lowering import abstract_model, compile_step
from support.tiny import BLOCK, CHUNK, CONFIG, ROWS, VOCAB, prompt, shapes

from jaxinfer import functional
from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.kernels.matmul import int8_matmul
from jaxinfer.layers.embedding import Embedding
from jaxinfer.layers.linear import FusedLinear, Output, RowLinear
from jaxinfer.layers.params import Build
from jaxinfer.loading import weights
from jaxinfer.sharding import axes, make_mesh

pytestmark = [pytest.mark.xdist_group("sharded"), pytest.mark.slow]

HEADS = CONFIG | dict(architectures=["LlamaForCausalLM"], num_attention_heads=8)


IN = 24
MODULES = {
    "fused": lambda build: FusedLinear(build, IN, (Output("a", 4, 8), Output("b", 17)), bias=True),
    "row": lambda build: RowLinear(build, axes.FFN, IN, 16, bias=True),
    "table": lambda build: Embedding(build, 50, IN),
}
SHAPES = {"fused": (1, 49, IN), "row": (16, IN), "table": (50, IN)}


@cache
def both(name: str) -> list[nnx.Module]:
    """Make a module in float32 and in int8 from the same random weights."""

    def make(quantization: str | None) -> nnx.Module:
        return MODULES[name](Build(nnx.Rngs(0), jnp.dtype("float32"), make_mesh(), quantization))

    def drawn(kind: str | None) -> nnx.Module:
        return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: make(kind))), jax.jit(lambda: nnx.state(make(kind)))())

    return [drawn(None), drawn("int8")]


@partial(jax.jit, static_argnums=0)
def _call(graph: nnx.GraphDef, state: nnx.State, x: jax.Array) -> tuple[jax.Array, ...]:
    module = nnx.merge(graph, state)
    return module(x) if isinstance(module, FusedLinear) else (module(x),)


@partial(jax.jit, static_argnums=0)
def _attend(graph: nnx.GraphDef, state: nnx.State, x: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).logits(x)


@pytest.mark.parametrize("name", MODULES)
def test_a_matrix_is_int8_with_a_scale_a_row_and_the_rest_is_not(name):
    module = both(name)[1]
    assert (module.weight.shape, module.weight.dtype) == (SHAPES[name], jnp.int8)
    assert (module.weight_scale.shape, module.weight_scale.dtype) == (SHAPES[name][:-1], jnp.float32)
    assert name == "table" or module.bias.dtype == jnp.float32


@pytest.mark.parametrize("name", MODULES)
def test_a_module_in_int8_is_near_the_one_in_float32(name):
    x = np.random.default_rng(1).normal(size=(6, IN)).astype(np.float32)
    apply = _attend if name == "table" else _call
    expected, found = (jax.tree.leaves(apply(*nnx.split(module), x)) for module in both(name))
    for one, other in zip(expected, found, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype == np.float32 and one.shape == other.shape
        np.testing.assert_allclose(other, one, rtol=0, atol=0.03 * np.abs(one).max())
        assert (one != other).any()


def test_a_tied_int8_table_looks_up_the_rows_it_multiplies_with():
    plain, found = both("table")
    tokens = np.array([3, 49, 0, 3])
    (expected,), (rows,) = (_call(*nnx.split(module), tokens) for module in (plain, found))
    rows = np.asarray(rows)
    kept = [int8_matmul.rotate_weight(np.asarray(one), found.block) for one in (rows, expected)]
    np.testing.assert_allclose(*kept, rtol=0, atol=0.51 * np.asarray(found.weight_scale[...]).max())
    np.testing.assert_array_equal(rows[0], rows[3])
    units = 127 * np.eye(IN, dtype=np.float32)  # quantized without loss
    np.testing.assert_allclose(np.asarray(_attend(*nnx.split(found), units))[:, 3] / 127, rows[0], rtol=1e-6)


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    """Logits `[V]` of a prompt by number of devices, quantization, and whether embedding and head are tied."""

    @cache
    def folder(tied: bool):
        changes = HEADS | {"tie_word_embeddings": tied}
        return checkpoint.write(tmp_path_factory.mktemp("quantised"), changes, with_tokenizer=False)

    @cache
    def of(tp: int, quantization: str | None, tied: bool = False, pad_heads: bool = False) -> np.ndarray:
        mesh = make_mesh(tp)
        module = weights.load(folder(tied), mesh, quantization=quantization, pad_heads=pad_heads, progress=False)
        program, params = functional.split(module, mesh)
        width = 2 * CHUNK // BLOCK
        batch = functional.prefill_batch([(prompt(CHUNK), 0, CHUNK)], np.arange(width)[None])
        cache = functional.init_cache(program, width, BLOCK)
        found, _ = jax.jit(functional.prefill, static_argnums=0)(program, params, cache, batch)
        return np.asarray(found)[0, :VOCAB]

    return of


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_model_in_int8_is_near_its_own_weights_over_any_number_of_devices(logits, tp, tied):
    plain, found = logits(1, None, tied), logits(tp, "int8", tied)
    distance = np.linalg.norm(found - plain) / np.linalg.norm(plain)

    assert 0 < distance < 0.15  # the distance to another prompt is 1.4


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_padding_heads_change_no_logits(logits, quantization):
    """Over three devices, over which eight heads with two kv heads do not divide."""
    plain, found = logits(1, None), logits(3, quantization, pad_heads=True)
    distance = np.linalg.norm(found - plain) / np.linalg.norm(plain)
    assert distance < (0.15 if quantization else 1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_int8_adds_no_collective(tied):
    @cache
    def collectives(layers: int, quantization: str | None) -> Counter[str]:
        hf = HEADS | {"num_hidden_layers": layers, "tie_word_embeddings": tied}
        program, params = abstract_model(hf, make_mesh(8), quantization=quantization)
        bucket = Bucket("decode", ROWS, ROWS, shapes().width, Level.GREEDY, -1)
        return compile_step(program, params, shapes(), bucket).collectives

    assert collectives(2, "int8") - collectives(1, "int8") == Counter({"all-reduce": 2})
    assert collectives(1, "int8") == collectives(1, None)
