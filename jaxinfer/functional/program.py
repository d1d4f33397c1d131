"""The static part of a module under jit, its parameters as a flat list, and the cache that both need."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxinfer.errors import ConfigError
from jaxinfer.functional.batch import Array
from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kernels.attention.quantised_cache import AUTO
from jaxinfer.kernels.attention.xla_attention import TILE
from jaxinfer.kernels.matmul import choose as matmul
from jaxinfer.kernels.triton import triton_launch
from jaxinfer.kv import cache as kv_cache
from jaxinfer.kv.groups import Layout, layout
from jaxinfer.kv.spec import Full, Spec, with_codes
from jaxinfer.layers import adapters
from jaxinfer.layers.attending import use_attention
from jaxinfer.layers.embedding import Embedding
from jaxinfer.layers.linear import use_fusion, use_kernel
from jaxinfer.media.inputs import Features
from jaxinfer.models.base import CrossSource, LanguageModel
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding import mesh as meshes

SMALL_TILE = 8
"""Queries per tile of XLA's attention in deterministic steps, where a decoding sequence has a tile of its own."""


@dataclass(frozen=True)
class Program:
    """The static part of a module under jit: everything but its parameters."""

    graph: nnx.GraphDef
    tree: jax.tree_util.PyTreeDef
    specs: tuple[Spec, ...]
    vocab: int
    """V': number of columns of the logits."""
    dtype: jnp.dtype
    mesh: Mesh
    kernel: str = "xla"
    """Attention implementation (`kernels.attention.choose`)."""
    tile: int = TILE
    """Number of queries in a prefill tile, as suits the kernel best."""
    features: Features | None = None
    """Inputs of the model beside tokens, such as images; None if there are none."""
    feature_width: int = 0
    """M of the rows computed by the model's encoder; 0 without one."""
    cross: CrossSource | None = None
    """Encoder inputs for cross-attention; None without it."""
    deterministic: bool = False
    """Whether a token's result may depend on nothing but its own sequence: kernels divide their work in the same way
    for every token, and recurrent layers advance one token at a time (`engine.runner.mixed`)."""
    divided_logits: bool = False
    """Whether logits are divided over the mesh by columns, as the head's rows are."""
    kv_cache_dtype: str = AUTO
    """How keys and values are stored, as in `EngineConfig`; the specs say it for each layer."""
    adapters: bool = False
    """Whether projections have LoRA adapters, so that batches say which one each token has (`layers.adapters`)."""
    draft: "Program | None" = None
    """Program of the draft model, whose keys and values lie in arrays of their own under the same block ids."""

    @property
    def layout(self) -> Layout:
        """Assignment of layers to cache arrays and block tables."""
        return layout(self.specs)

    def block_bytes(self, block_size: int) -> int:
        """Return the bytes that one block id takes over all devices, the draft model's included."""
        own = kv_cache.block_bytes(self.layout.array_specs, block_size, self.dtype, self.mesh)
        return own + (0 if self.draft is None else self.draft.block_bytes(block_size))

    def module(self, params: Sequence[Array]) -> LanguageModel:
        """Return the module with these parameters; under a trace this costs nothing at run time."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, params))

    def places(self, kind: Any = ...) -> dict[str, int]:
        """Return each parameter's place in the list by its path in the module; `kind` is a filter of NNX."""
        numbered = nnx.filter_state(jax.tree.unflatten(self.tree, range(self.tree.num_leaves)), kind)
        return {".".join(map(str, path)): one.get_value() for path, one in nnx.to_flat_state(numbered)}


def split(
    module: LanguageModel,
    mesh: Mesh | None = None,
    *,
    attention_kernel: str = attention.AUTO,
    matmul_kernel: str = attention.AUTO,
    fuse_projections: bool = True,
    deterministic: bool = False,
    kv_cache_dtype: str = AUTO,
) -> tuple[Program, list[Array]]:
    """Split a module into a static program and the flat list of its parameters (shapes if the module is abstract).

    The list is flat because dispatch takes 0.08 ms with it and 11.6 ms through `nnx.jit`.

    Args:
        module: the model; its layers are set to the chosen kernels.
        mesh: mesh of the parameters; None for one over a single device.
        attention_kernel, matmul_kernel, deterministic, kv_cache_dtype: as in `EngineConfig`.
        fuse_projections: whether projections with the same input are computed by one product.

    Raises:
        ConfigError: a kernel or `kv_cache_dtype` is unknown or does not support these devices.
    """
    mesh = make_mesh() if mesh is None else meshes.normalise(mesh)
    product = matmul.choose(matmul_kernel, mesh)
    # XLA cannot divide the call of a kernel over devices.
    target = triton_launch.target(mesh) if mesh.size == 1 else None
    use_kernel(module, matmul.stable(product) if deterministic else product, target)
    use_fusion(module, fuse_projections)
    kernel = attention.choose(attention_kernel, mesh)
    use_attention(module, kernel)
    graph, state = nnx.split(module)
    params, tree = jax.tree.flatten(state)
    dtype = _activation_dtype(module, params)
    vocab = -(-module.config.vocab_size // meshes.size(mesh)) * meshes.size(mesh)
    attention.check_cache(kernel, kv_cache_dtype, dtype, mesh)
    specs = with_codes(module.cache_specs(), kv_cache_dtype)
    widths = [spec.head_dim for spec in specs if isinstance(spec, Full)]
    if not widths:
        raise ConfigError(
            f"the {type(module).__name__} has no attention layer (layer_types, attn_layer_indices), and needs one: the "
            "lengths of sequences are those of its blocks"
        )
    widest = max(widths)
    tile = attention.prefill_tile(kernel, module.config.query_group, widest, dtype.itemsize)
    if deterministic and kernel in attention.XLA_PREFILL:
        tile = SMALL_TILE
    program = Program(graph, tree, specs, vocab, dtype, mesh, kernel, tile, module.config.features)
    program = replace(program, adapters=bool(adapters.parts(module)), divided_logits=_divides_logits(module))
    width, cross = _feature_width(program, params), module.config.cross
    program = replace(program, deterministic=deterministic, kv_cache_dtype=kv_cache_dtype)
    return replace(program, feature_width=width, cross=cross), params


def _divides_logits(module: nnx.Module) -> bool:
    return any(part.logit_shards > 1 for _, part in nnx.iter_modules(module) if isinstance(part, Embedding))


def _activation_dtype(module: nnx.Module, params: Sequence[Array]) -> jnp.dtype:
    """Return the dtype of the hidden states and the cache: that of the token embedding.

    For a module without a `layers.embedding.Embedding` it is the dtype of most parameter values. Single parameters may
    differ: scales of quantised weights are float32, and a user may keep some parameters in more or fewer bits.
    """
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Embedding) and part.lookup:
            own = jnp.dtype(part.weight.dtype)
            return own if jnp.issubdtype(own, jnp.floating) else jnp.dtype(part.dtype)
    sizes: Counter[jnp.dtype] = Counter()
    for param in params:
        if jnp.issubdtype(param.dtype, jnp.floating):
            sizes[jnp.dtype(param.dtype)] += math.prod(param.shape)
    return sizes.most_common(1)[0][0]


def _feature_width(program: Program, params: Sequence[Array]) -> int:
    """Return the width M of the encoder's output, found by tracing it."""
    features = program.features
    if features is None:
        return 0
    if features.joint is not None:
        return features.joint.width
    inputs = jax.ShapeDtypeStruct((1, *features.shape), program.dtype)
    made = jax.eval_shape(partial(encode, program), params, inputs).shape
    if made[:-1] != (1, features.rows):
        raise ConfigError(
            f"the module's encode returns shape {made} for inputs {inputs.shape}, but its config.features declares "
            f"{features.rows} rows per input"
        )
    return made[-1]


def encode(program: Program, params: Sequence[jax.Array], inputs: jax.Array) -> jax.Array:
    """Run the encoder on inputs `[n, *features.shape]` and return the rows of each, `[n, rows, M]`."""
    return program.module(params).encode(inputs.astype(program.dtype))


def init_cache(program: Program, num_blocks: int, block_size: int = 16, slots: int = 1) -> Cache:
    """Allocate a cache of zeros on the program's mesh: keys and values `[N, K, P, D]` for each array index.

    A layer has arrays of its own, or shares them with layers of other groups (`Program.layout`). A recurrent layer has
    its own arrays, `[slots, ...]`.

    Args:
        num_blocks: N, blocks of each array.
        block_size: P, positions in a block.
        slots: states of each recurrent layer; ignored without such layers.
    """
    return kv_cache.allocate(abstract_cache(program, num_blocks, block_size, slots))


def abstract_cache(program: Program, num_blocks: int, block_size: int, slots: int = 1) -> Cache:
    """Return shapes and shardings of `init_cache` without allocating it."""
    cache_layout = program.layout
    return kv_cache.abstract(
        (*cache_layout.array_specs, *cache_layout.states), num_blocks, block_size, program.dtype, program.mesh, slots
    )
