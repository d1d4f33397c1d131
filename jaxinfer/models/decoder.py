"""Decoder stack of Llama and its relatives: attention, gated MLP or experts, and norms, unrolled over layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.checkpoint.weight_table import Rule, expand
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kv.spec import Spec, State
from jaxinfer.layers.attention import Attention, AttentionSpec, Lending, Loan, StepContext
from jaxinfer.layers.delta_net import DeltaNetSpec, GatedDeltaNet
from jaxinfer.layers.embedding import Embedding
from jaxinfer.layers.gathering import gather
from jaxinfer.layers.kda import KdaSpec, KimiDeltaAttention
from jaxinfer.layers.mamba import Mamba, MambaSpec
from jaxinfer.layers.mla import LatentAttention, LatentSpec
from jaxinfer.layers.mlp import GatedMLP
from jaxinfer.layers.moe import MoE
from jaxinfer.layers.norms import LayerNorm, RMSNorm
from jaxinfer.layers.params import Build
from jaxinfer.layers.rope import cos_sin
from jaxinfer.layers.short_conv import ShortConv, ShortConvSpec
from jaxinfer.models.base import FeatureRows
from jaxinfer.models.decoder_config import AFTER, BEFORE, DecoderConfig, Mixer
from jaxinfer.models.mla_rules import mla_rules
from jaxinfer.models.moe_rules import MoENames, moe_rules
from jaxinfer.models.recurrent_rules import recurrent_rules
from jaxinfer.sharding import axes

MIXERS: Mapping[type, type[nnx.Module]] = {
    AttentionSpec: Attention,
    LatentSpec: LatentAttention,
    KdaSpec: KimiDeltaAttention,
    DeltaNetSpec: GatedDeltaNet,
    ShortConvSpec: ShortConv,
    MambaSpec: Mamba,
}
"""Module class of each token mixer spec, constructed from a `Build` and the spec; each has a `cache_spec`."""


class Layer(nnx.Module):
    """Decoder layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`, with the norms that the config declares.

    Families with a different layer structure subclass it: `__call__` for the order of the parts, `add` for the
    residual, `norm_names` for the norms. They pass the class to `Decoder` and to `weight_rules`.
    """

    def __init__(self, build: Build, config: DecoderConfig, number: int):
        width, norms = config.attention.width, set(self.norm_names(config))
        bare = number in config.bare_layers
        norms -= {"mlp_norm", "mlp_post_norm"} if bare else set()

        def norm(name: str) -> RMSNorm | LayerNorm | None:
            return _norm(build.at(name), config) if name in norms else None

        self.attention_norm = norm("attention_norm")
        spec = config.attention_of(number)
        self.attention = MIXERS[type(spec)](build.at("attention"), spec)
        self.attention_post_norm = norm("attention_post_norm")
        self.mlp_norm = norm("mlp_norm")
        moe = config.moe_of(number)
        mlp = build.at("mlp")
        self.mlp = None if bare else _mlp(mlp, config, number) if moe is None else MoE(mlp, width, moe)
        self.mlp_post_norm = norm("mlp_post_norm")

    @staticmethod
    def norm_names(config: DecoderConfig) -> Mapping[str, str]:
        """Return the norms of a layer: attribute name to name in checkpoints."""
        return _norm_names(config.norms)

    def __call__(
        self, x: jax.Array, kv_cache: Any, rope: tuple[jax.Array, jax.Array] | None, step: StepContext
    ) -> tuple[jax.Array, Any]:
        """Map hidden states `[T, M]` to `[T, M]`; also return the layer's new cache or state."""
        y, kv_cache = self.attend(_normed(self.attention_norm, x), kv_cache, rope, step)
        y = _normed(self.attention_post_norm, y)
        if self.mlp is None:
            return self.add(x, y), kv_cache
        x, normed = self.added(x, y)
        y = self.feed_forward(normed, step)
        return self.add(x, _normed(self.mlp_post_norm, y)), kv_cache

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Add the output of attention or the MLP, `[T, M]`, to the residual `[T, M]`."""
        return x + y

    def added(self, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the residual with the output of attention added, and the input of the MLP."""
        if isinstance(self.mlp_norm, RMSNorm) and type(self).add is Layer.add:
            return self.mlp_norm.of_sum(x, y)
        x = self.add(x, y)
        return x, _normed(self.mlp_norm, x)

    def attend(
        self, x: jax.Array, kv_cache: Any, rope: tuple[jax.Array, jax.Array] | None, step: StepContext
    ) -> tuple[jax.Array, Any]:
        """Mix the tokens of each sequence, `[T, M]` to `[T, M]`; also return the layer's new cache or state."""
        if isinstance(self.attention.cache_spec, State):
            return self.attention(x, kv_cache, step.states)
        return self.attention(x, kv_cache, rope, step)

    def feed_forward(self, x: jax.Array, step: StepContext) -> jax.Array:
        """Apply the MLP or the mixture of experts to `[T, M]`."""
        return self.mlp(x, step) if isinstance(self.mlp, MoE) else self.mlp(x)


def _mlp(build: Build, config: DecoderConfig, number: int) -> GatedMLP:
    """Build the MLP of a layer without experts."""
    options = dict(bias=config.mlp_bias, gated=config.mlp_gated)
    return GatedMLP(build, config.attention.width, config.ffn_of(number), config.activation, **options)


def _norm(build: Build, config: DecoderConfig) -> RMSNorm | LayerNorm:
    """Build a norm of the model's width."""
    width = config.attention.width
    if config.centred_norms:
        return LayerNorm(build, width, config.norm_eps, axes.EMBED, bias=config.norm_bias)
    return RMSNorm(build, width, config.norm_eps, axes.EMBED, config.norm_scaling)


def _normed(norm: nnx.Module | None, x: jax.Array) -> jax.Array:
    """Apply a norm; None is the identity."""
    return x if norm is None else norm(x)


@dataclass
class Pass:
    """What layers hand on beside hidden states while a step is traced."""

    cache: list[Any]
    """Cache arrays, each replaced by the layer that writes it."""
    beside: Any = None
    """Result of `Decoder.beside`."""
    loans: dict[int, Loan] = field(default_factory=dict)
    """Keys and values of this step's tokens, by the layer that lends them."""


class Decoder(nnx.Module):
    """Decoder: embedding, layers, final norm, head. Layers are unrolled, as a scan is three times slower.

    Args:
        build: dtype, mesh and path of the parameters.
        config: shape of the decoder.
        block: class of the layers.
    """

    def __init__(self, build: Build, config: DecoderConfig, block: type[Layer] = Layer):
        self.config, self.mesh = config, build.mesh
        # A table used for lookups only gains nothing from int8.
        lookup = build if config.tied else build._replace(quantization=None)
        sizes = config.vocab_size, config.attention.width
        logits = {"softcap": config.logit_softcap, "logit_scale": config.logit_scale}
        self.embedding = Embedding(
            lookup.at("embedding"),
            *sizes,
            head=config.tied,
            scale=config.embedding_scale,
            round_scale=config.round_embedding_scale,
            **logits,
        )
        self.layers = nnx.List([block(build.at("layers", i), config, i) for i in range(config.num_layers)])
        self.norm = _norm(build.at("norm"), config)
        own = {"lookup": False, "head": True, "bias": config.head_bias}
        self.head = None if config.tied else Embedding(build.at("head"), *sizes, **own, **logits)

    def __call__(
        self, tokens: jax.Array, step: StepContext, cache: Cache, features: FeatureRows | None = None
    ) -> tuple[jax.Array, Cache]:
        """Compute hidden states `[T, M]` after the final norm for token ids `[T]`; also return the new cache arrays.

        `features` are encoder rows that replace the embeddings of some tokens.
        """
        embedding, tokens = gather(self.embedding, self.mesh, tokens)
        x, deeper = embedding(tokens), ()
        if features is not None:
            x, *deeper = features.placed(x)
        if step.deterministic:  # products skip padding that is zero (`kernels.matmul.choose.STABLE`)
            x = jnp.where(step.real[:, None], x, 0)
        ropes = [self.config.rope_of(number) for number in range(self.config.num_layers)]
        positions = step.positions if step.rope_positions is None else step.rope_positions
        turned = {
            rope: None if rope is None else cos_sin(rope, positions, step.rope_lengths) for rope in dict.fromkeys(ropes)
        }
        run = Pass(list(cache), beside=self.beside(tokens, x, step))
        for number, layer in enumerate(self.layers):
            layer, x = gather(layer, self.mesh, x)
            x = self.apply(number, layer, x, turned[ropes[number]], step, run)
            if number < len(deeper):
                x = x + deeper[number]
        return self.norm(x), run.cache

    def beside(self, tokens: jax.Array, x: jax.Array, step: StepContext) -> Any:
        """Return what layers get beside hidden states, from token ids `[T]` and embeddings `[T, M]`; nothing here."""

    def more(self, number: int, run: Pass) -> Mapping[str, Any]:
        """Return further arguments of a layer's call; none here."""
        return {}

    def apply(
        self,
        number: int,
        layer: Layer,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array] | None,
        step: StepContext,
        run: Pass,
    ) -> jax.Array:
        """Apply a layer to `[T, M]`, and replace its entries of the cache."""
        index, lender = step.array_index(number), self.config.lender_of(number)
        own = step.of(number) if lender is None else replace(step.of(number), lent=run.loans[lender])
        call = self.remembering(partial(layer, rope=rope, step=own, **self.more(number, run)), step)
        x, stored = call(x, run.cache[index])
        if isinstance(stored, Lending):
            stored, run.loans[number] = stored
        run.cache[index] = stored
        return x

    @staticmethod
    def remembering(run: Callable[..., Any], step: StepContext) -> Callable[..., Any]:
        """Return a layer's call; with `step.remat` a gradient computes its activations again."""
        return jax.checkpoint(run) if step.remat else run

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Compute float32 logits `[B, V']` of hidden states `[B, M]`."""
        head, hidden = gather(self.embedding if self.head is None else self.head, self.mesh, hidden)
        return head.logits(hidden)

    def cache_specs(self) -> Sequence[Spec]:
        """Return what each layer caches."""
        return [layer.attention.cache_spec for layer in self.layers]


def weight_rules(
    config: DecoderConfig, *, fused: bool = False, names: MoENames = MoENames(), block: type[Layer] = Layer
) -> list[Rule]:
    """Return the weight table of the Llama lineage.

    Args:
        config: shape of the decoder.
        fused: whether the checkpoint stores q, k, v and gate, up fused (Phi-3).
        names: checkpoint names of the parts of layers with experts.
        block: class of the layers, which names its norms.
    """
    layer = "model.layers.{i}"
    first = ("gate", "up") if config.mlp_gated else ("up",)
    gate_up = [("gate_up", first)] if fused else [(part, (part,)) for part in first]
    norms = {
        "model.norm": "norm",
        **{f"{layer}.{name}": f"layers.{{i}}.{own}" for own, name in block.norm_names(config).items()},
    }
    parts = {"weight": "scale", "bias": "bias"} if config.norm_bias else {"weight": "scale"}
    table = [
        Rule("model.embed_tokens.weight", "embedding.weight"),
        Rule("lm_head.weight", "embedding.weight", tied="head")
        if config.tied
        else Rule("lm_head.weight", "head.weight"),
        *([Rule("lm_head.bias", "head.bias")] if config.head_bias else []),
        *(Rule(f"{norm}.{name}", f"{own}.{part}") for norm, own in norms.items() for name, part in parts.items()),
    ]

    def linear(name: str, target: str, parts: tuple[str, ...]) -> None:
        for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
            # Some checkpoints name the tensors of an MLP like those of a mixture of experts.
            source, *also = (f"{layer}.{prefix}.{name}.{kind}" for prefix in names.prefixes)
            table.append(Rule(source, f"layers.{{i}}.mlp.{target}.{kind}", parts, tuple(also)))

    made, table = expand(table, config.num_layers), []
    for name, parts in gate_up:
        linear(f"{name}_proj", "gate_up", parts)
    linear("down_proj", "down", ())
    for i in range(config.num_layers):
        moe, rules = config.moe_of(i), _mixer_rules(config.attention_of(i), fused=fused)
        if i not in config.bare_layers:
            rules = rules + (table if moe is None else moe_rules(moe, names))
        made += [rule.of_layer(i) for rule in rules]
    bare = tuple(f"layers.{i}.mlp_" for i in config.bare_layers)
    return [rule for rule in made if not str(rule.target).startswith(bare)]


def _mixer_rules(spec: Mixer, *, fused: bool) -> list[Rule]:
    """Return the rules of a layer's token mixer."""
    if isinstance(spec, AttentionSpec):
        return _attention_rules(spec, fused=fused)
    if isinstance(spec, LatentSpec):
        return mla_rules(query_rank=spec.query_rank is not None, bias=spec.bias)
    return recurrent_rules(spec)


def _attention_rules(spec: AttentionSpec, *, fused: bool) -> list[Rule]:
    made = ("q",) if spec.lender is not None else ("q", "k") if spec.keys_are_values else ("q", "k", "v")
    qkv = [("qkv", made)] if fused else [(part, (part,)) for part in made]
    source, target, table = "model.layers.{i}.self_attn", "layers.{i}.attention", []
    linears = [*((name, "qkv", parts, spec.qkv_bias) for name, parts in qkv), ("o", "out", (), spec.out_bias)]
    for name, path, parts, bias in linears:
        for kind in ("weight", "bias") if bias else ("weight",):
            table.append(Rule(f"{source}.{name}_proj.{kind}", f"{target}.{path}.{kind}", parts))
    for part in ("k", "v") if spec.lender is not None else ():
        table += [Rule(f"{source}.{part}_proj.{kind}", None, optional=True) for kind in ("weight", "bias")]
    for part in ("q", "k") if spec.norm_eps is not None else ():
        if part not in made:
            table.append(Rule(f"{source}.{part}_norm.weight", None, optional=True))
            continue
        path, outputs = ("norm_scale", (part,)) if spec.norm_whole else (f"{part}_norm.scale", ())
        table.append(Rule(f"{source}.{part}_norm.weight", f"{target}.{path}", outputs))
    if spec.sinks:
        table.append(Rule(f"{source}.sinks", f"{target}.sinks", ("sinks",)))
    return table


def _norm_names(norms: Sequence[str]) -> dict[str, str]:
    """Return the norms of a layer: attribute name to name in checkpoints."""
    before = {"attention_norm": "input_layernorm"}
    if AFTER not in norms:
        return before | {"mlp_norm": "post_attention_layernorm"}
    after = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
    return before | {"mlp_norm": "pre_feedforward_layernorm"} | after if BEFORE in norms else after
