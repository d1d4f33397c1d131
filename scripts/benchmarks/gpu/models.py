"""Make random models of well-known shapes on the device, within seconds."""

import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxinfer.checkpoint import rules
from jaxinfer.kv import cache as kv_cache
from jaxinfer.loading import weights
from jaxinfer.models.base import LanguageModel
from jaxinfer.sharding import rules as sharding_rules


def llama(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    vocab: int,
    *,
    tied: bool = False,
    dtype: str = "bfloat16",
    positions: int = 131072,
) -> dict[str, Any]:
    """Return the config.json of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "dtype": dtype,
    }


LLAMA_8B = llama(4096, 32, 32, 8, 14336, 128256)
"""Shape of Llama 3 8B."""
LLAMA_1B = llama(2048, 16, 32, 8, 8192, 128256, tied=True)
"""Shape of Llama 3.2 1B: head dimension 64, tied embedding."""
LLAMA_250M = llama(1024, 16, 16, 4, 2816, 32000)
TOY = llama(64, 2, 4, 2, 96, 259, positions=2048, dtype="float32")
"""Shape for dry runs."""


def kimi_linear(
    hidden: int,
    ffn: int,
    heads: int,
    dim: int,
    rank: int,
    experts: int,
    expert_ffn: int,
    vocab: int,
    layers: int,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Return the config.json of a Kimi-Linear: every fourth layer is MLA, and all layers but the first have experts."""
    full = [n for n in range(1, layers + 1) if n % 4 == 0]
    return {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": dim,
        "qk_rope_head_dim": dim // 2,
        "v_head_dim": dim,
        "num_experts": experts,
        "num_experts_per_token": min(8, experts // 2),
        "num_shared_experts": 1,
        "moe_intermediate_size": expert_ffn,
        "first_k_dense_replace": 1,
        "rms_norm_eps": 1e-5,
        "dtype": dtype,
        "model_max_length": 1048576,
        "routed_scaling_factor": 2.446,
        "linear_attn_config": {
            "num_heads": heads,
            "head_dim": dim,
            "short_conv_kernel_size": 4,
            "full_attn_layers": full,
            "kda_layers": [n for n in range(1, layers + 1) if n not in full],
        },
    }


KIMI_LINEAR = kimi_linear(2304, 9216, 32, 128, 512, 256, 1024, 163840, layers=12)
"""Widths of Kimi-Linear-48B-A3B; its full 27 layers do not fit on one device."""
KIMI_LINEAR_4 = kimi_linear(2304, 9216, 32, 128, 512, 256, 1024, 163840, layers=4)
"""Four of its layers, three of them KDA, for compilations."""
KIMI_LINEAR_TOY = kimi_linear(32, 48, 4, 8, 16, 6, 24, 97, layers=4, dtype="float32")


def random(hf: dict[str, Any], mesh: Mesh, seed: int = 0) -> LanguageModel:
    """Make a model with weights of realistic scale, each created on its own device, so that memory holds one copy.

    `loading.weights.random` compiles one program that draws all weights, which takes more than a minute for 32 layers.
    Here each shape is compiled once, and the values come from a hash.
    """
    model_family, config = weights.parse(hf)
    kind = weights.resolve_dtype("auto", hf["dtype"], mesh.devices.flat[0].platform)
    module = weights.abstract(model_family, config, kind, mesh)
    graph, state = nnx.split(module)
    leaves = []
    for number, (path, param) in enumerate(rules.parameters(module).items()):
        placed = sharding_rules.of(mesh, param.get_metadata(), param.shape, path)
        make = _maker(param.shape, param.dtype, placed)
        leaves.append(make(jnp.uint32(1000003 * seed + number)))
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))


_MLP = re.compile(r"^layers\.(\d+)\.mlp\.(gate_up|down)\.")


@cache
def _maker(shape: tuple[int, ...], dtype: jnp.dtype, placed: NamedSharding) -> Any:
    return jax.jit(lambda number: values(number, shape, dtype), out_shardings=placed)


def values(number: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Return a vector of ones (a norm's scale), or uniform values of standard deviation `shape[-1]^-0.5`.

    A multiplicative hash of each index (murmur3's finaliser) fuses into one kernel without temporaries, whereas JAX's
    generator materialises its counters first.
    """
    if len(shape) == 1:
        return jnp.ones(shape, dtype)
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    x = place * jnp.uint32(0x9E3779B9) + number * jnp.uint32(0x85EBCA6B)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    even = (x ^ (x >> 16)).astype(jnp.float32) / 2.0**32 - 0.5
    return (even * (12 / shape[-1]) ** 0.5).astype(dtype)


def step_bytes(module: LanguageModel) -> int:
    """Return the bytes of weights that a decode step reads: all, but only one row of an untied embedding."""
    return sum(
        param.nbytes
        for path, param in arrays(module)
        if not (path.startswith("embedding.") and module.head is not None)
    )


def touched_bytes(module: LanguageModel) -> int:
    """Return the part of `step_bytes` that one token uses: only the routed experts of each layer."""
    moe, dense = module.config.moe, {str(layer) for layer in module.config.dense_layers}
    found = ((_MLP.search(path), array.nbytes) for path, array in arrays(module))
    routed = sum(size for match, size in found if match and match[1] not in dense)
    return step_bytes(module) - routed + routed * moe.per_token // moe.experts


def matrix_sizes(module: LanguageModel) -> tuple[int, int]:
    """Return the number of weights that every prompt token is multiplied with, and the number in the head."""
    sizes = {path: array.size for path, array in arrays(module) if array.ndim > 1}
    outer = {path: size for path, size in sizes.items() if path.startswith(("embedding.", "head."))}
    return sum(sizes.values()) - sum(outer.values()), outer.get("head.weight", outer["embedding.weight"])


def token_bytes(module: LanguageModel, mesh: Mesh, dtype: jnp.dtype) -> int:
    """Return the bytes of keys and values of one position over all layers."""
    return kv_cache.block_bytes(module.cache_specs(), 1, dtype, mesh)


def arrays(module: LanguageModel) -> list[tuple[str, jax.Array]]:
    """Return the parameters with their paths."""
    return [(path, param[...]) for path, param in rules.parameters(module).items()]
