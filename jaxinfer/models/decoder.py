"""The decoder stack that Llama and its relatives share: attention and gated MLP or experts with their norms, unrolled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.checkpoint.hf import ConfigReader
from jaxinfer.checkpoint.rules import Rule, expand
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.paged import Cache
from jaxinfer.kv.spec import Full, State
from jaxinfer.layers.attention import Attention, AttentionSpec, StepContext
from jaxinfer.layers.delta import DeltaSpec
from jaxinfer.layers.delta_net import DeltaNetSpec, GatedDeltaNet
from jaxinfer.layers.embedding import Embedding
from jaxinfer.layers.kda import KdaSpec, KimiDeltaAttention
from jaxinfer.layers.mla import LatentAttention, LatentSpec
from jaxinfer.layers.mlp import ACTIVATIONS, GatedMLP
from jaxinfer.layers.moe import MoE, MoEConfig
from jaxinfer.layers.norms import RMSNorm, Scaling
from jaxinfer.layers.params import Build
from jaxinfer.layers.rope import RopeConfig, cos_sin
from jaxinfer.models.base import CrossSource, FeatureRows, Features
from jaxinfer.models.delta_rules import delta_net_rules, kda_rules
from jaxinfer.models.mla_rules import mla_rules
from jaxinfer.models.moe_rules import MoENames, moe_rules
from jaxinfer.sharding import axes


FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
"""Kinds of layers, by the names that config.json has for them in `layer_types`."""

BEFORE, AFTER = "before", "after"
"""Where an RMSNorm stands: on what attention or the MLP takes, or on what it gives, before that is added."""

Mixer: TypeAlias = AttentionSpec | LatentSpec | KdaSpec | DeltaNetSpec
"""How the tokens of a sequence come together in a layer."""

MIXERS: Mapping[type, type[nnx.Module]] = {
    AttentionSpec: Attention, LatentSpec: LatentAttention, KdaSpec: KimiDeltaAttention, DeltaNetSpec: GatedDeltaNet,
}  # fmt: skip
"""The module of each, made of a `Build` and its spec; it has a `cache_spec`."""


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of this stack, every number that shapes it."""

    vocab_size: int
    """V."""
    num_layers: int
    ffn: int
    """F."""
    activation: str
    norm_eps: float
    attention: AttentionSpec | LatentSpec
    rope: RopeConfig | None
    """None: positions are not attention's affair."""
    max_position: int
    """Positions the model was made for."""
    local_rope: RopeConfig | None = None
    """Of layers of kind `SLIDING`; None: as of the others."""
    norms: tuple[str, ...] = (BEFORE,)
    """Where attention and the MLP have one: `BEFORE`, `AFTER`, or both (Gemma 2)."""
    norm_scaling: Scaling = Scaling()
    """Of all norms of the model's width."""
    embedding_scale: float | None = None
    """Multiplies the rows of tokens, rounded to their dtype; None: they stay."""
    logit_softcap: float | None = None
    """Logits x become cap * tanh(x / cap) (Gemma 2, arXiv:2408.00118); None: they stay."""
    window: int | None = None
    """Positions that a token sees in layers of kind `SLIDING`, itself included."""
    kinds: tuple[str, ...] = ()
    """One a layer, `FULL`, `SLIDING` or `LINEAR`; none: all are full."""
    linear: KdaSpec | DeltaNetSpec | None = None
    """The layers of kind `LINEAR`, which have a recurrent state."""
    recomputed: bool = False
    """Whether a sequence is computed again where longrope's frequencies change (Phi-3)."""
    mlp_bias: bool = False
    moe: MoEConfig | None = None
    """Of the layers that have experts in the place of an MLP."""
    dense_layers: tuple[int, ...] = ()
    """Those that have an MLP all the same."""
    tied: bool = False
    """The head is the embedding."""
    features: Features | None = None
    """Nothing is read beside tokens."""
    cross: CrossSource | None = None
    """There is no cross-attention."""

    @property
    def query_group(self) -> int:
        """Query heads that share a kv head."""
        spec = self.attention
        return spec.heads if isinstance(spec, LatentSpec) else spec.heads // spec.kv_heads

    @property
    def max_length(self) -> int:
        """The longest sequence whose numbers are the model's own."""
        # Where kinds of layers have ropes of their own, what config.json says is the stretched length already.
        stretched = self.rope is not None and self.local_rope is None and self.rope.kind in ("linear", "dynamic")
        return int(self.max_position * (self.rope.factor if stretched else 1.0))

    def slides(self, layer: int) -> bool:
        """Whether one layer sees only a window."""
        return bool(self.kinds) and self.kinds[layer] == SLIDING

    def attention_of(self, layer: int) -> Mixer:
        """The shape of one layer's attention."""
        if self.kinds and self.kinds[layer] == LINEAR:
            return self.linear
        return replace(self.attention, window=self.window) if self.slides(layer) else self.attention

    def rope_of(self, layer: int) -> RopeConfig | None:
        """The rotary embedding of one layer."""
        return self.local_rope if self.local_rope is not None and self.slides(layer) else self.rope

    def moe_of(self, layer: int) -> MoEConfig | None:
        """The experts of one layer; None: it has an MLP."""
        return None if layer in self.dense_layers else self.moe

    def length_key(self, prompt_length: int) -> bytes:
        """What of a prompt's length changes its keys (rope scalings that follow the length)."""
        ropes = [rope for rope in (self.rope, self.local_rope) if rope is not None]
        return b",".join(rope.length_key(prompt_length) for rope in ropes)

    @property
    def recompute_after(self) -> int | None:
        """longrope has other frequencies beyond its original length."""
        longrope = self.recomputed and self.rope is not None and self.rope.kind == "longrope"
        return self.rope.original_max_position if longrope else None


def read_config(
    reader: ConfigReader, *, qkv_bias: bool = False, out_bias: bool = False, qk_norm: bool = False,
    mlp_bias: bool = False, window: int | None = None, kinds: Sequence[str] = (), partial_rotary: bool = False,
    moe: MoEConfig | None = None, dense_layers: Sequence[int] = (), activation: str = "hidden_act",
    local_rope: Mapping[str, Any] | None = None,
) -> DecoderConfig:  # fmt: skip
    """The attributes that all families of this stack name alike.

    `kinds`: of the layers, where a window is not that of all of them (`layer_kinds`).
    `moe`: the experts of all but the `dense_layers`.
    `activation`: what config.json calls it.
    `local_rope`: what is different about the rope of sliding layers, where config.json has not one of each kind.

    Raises:
        ConfigError: sizes that do not fit each other, an unknown activation or rope.
    """
    width, heads = reader.get_int("hidden_size"), reader.get_int("num_attention_heads")
    kv_heads = reader.get_int("num_key_value_heads", heads)
    head_dim = reader.get_int("head_dim", None) or _divide("hidden_size", width, "num_attention_heads", heads)
    _divide("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    chosen = reader.get_str(activation, "silu")
    if chosen not in ACTIVATIONS:
        raise ConfigError(f"config.json: {activation} is {chosen!r}; supported: {', '.join(ACTIVATIONS)}")
    eps = reader.get_float("rms_norm_eps", 1e-6)
    rope, local = _ropes(reader, head_dim, local_rope)
    turned = min(one.rotary_dim for one in (rope, local) if one is not None)
    if turned != head_dim and not partial_rotary:
        raise ConfigError(
            f"config.json: rope turns {turned} of {head_dim} dimensions (partial_rotary_factor), which "
            f"{reader.family} does not know; leave it out or use a family that does (Phi3ForCausalLM)"
        )
    spec = AttentionSpec(width, heads, kv_heads, head_dim, qkv_bias, out_bias, eps if qk_norm else None)
    layers = reader.get_int("num_hidden_layers")
    if window is None and SLIDING in kinds:
        raise ConfigError(f"config.json: layer_types names {SLIDING}, but there is no sliding_window in use; give its size")
    return DecoderConfig(
        vocab_size=reader.get_int("vocab_size"), num_layers=layers,
        ffn=reader.get_int("intermediate_size"), activation=chosen, norm_eps=eps, attention=spec,
        rope=rope, local_rope=local, max_position=reader.get_int("max_position_embeddings"), window=window,
        kinds=tuple(kinds) or ((SLIDING if window else FULL),) * layers,
        mlp_bias=mlp_bias, moe=moe, dense_layers=tuple(dense_layers), tied=reader.get_bool("tie_word_embeddings", False),
    )  # fmt: skip


def layer_kinds(
    reader: ConfigReader, default: Sequence[str], known: Sequence[str] = (FULL, SLIDING)
) -> tuple[str, ...]:
    """`layer_types` of config.json, one a layer; `default` where it is absent. `known`: to the family.

    Raises:
        ConfigError: of another length, or with a kind that this stack has not.
    """
    kinds, layers = reader.get("layer_types", list(default)), reader.get_int("num_hidden_layers")
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(f"config.json: layer_types must be a list of num_hidden_layers = {layers} kinds, got {kinds!r}")
    for number, kind in enumerate(kinds):
        if kind not in known:
            raise ConfigError(
                f"config.json: layer_types[{number}] is {kind!r}, which {reader.family} does not know; it may be "
                f"{' or '.join(map(repr, known))}"
            )
    return tuple(kinds)


def _ropes(
    reader: ConfigReader, head_dim: int, local: Mapping[str, Any] | None
) -> tuple[RopeConfig, RopeConfig | None]:
    """Of full and of sliding layers; `rope_parameters` may have an object of each kind, as transformers 5 writes it."""
    each = reader.get("rope_parameters", None)
    if isinstance(each, Mapping) and not {FULL, SLIDING}.isdisjoint(each):
        unknown = sorted(set(each) - {FULL, SLIDING})
        if unknown:
            raise ConfigError(f"config.json: rope_parameters names {', '.join(unknown)}, beside {FULL} and {SLIDING}")
        alone = {"rope_scaling": None, "rope_theta": None}
        found = [reader.rope(head_dim, **alone, rope_parameters=each[kind]) for kind in (FULL, SLIDING) if each.get(kind)]
        return found[0], found[-1]
    rope = reader.rope(head_dim)
    return rope, None if local is None else reader.rope(head_dim, **local)


def _divide(name: str, size: int, by_name: str, by: int) -> int:
    if size % by:
        raise ConfigError(f"config.json: {name} is {size}, which {by_name} = {by} does not divide")
    return size // by


class Layer(nnx.Module):
    """One block: `x + attention(x)`, then `x + mlp(x)`, both with the norms that the config declares."""

    def __init__(self, build: Build, config: DecoderConfig, number: int):
        width = config.attention.width

        def norm(name: str, where: str) -> RMSNorm | None:
            return _norm(build.at(name), config) if where in config.norms else None

        self.attention_norm = norm("attention_norm", BEFORE)
        spec = config.attention_of(number)
        self.attention = MIXERS[type(spec)](build.at("attention"), spec)
        self.attention_post_norm = norm("attention_post_norm", AFTER)
        self.mlp_norm = norm("mlp_norm", BEFORE)
        moe = config.moe_of(number)
        self.mlp = (
            GatedMLP(build.at("mlp"), width, config.ffn, config.activation, bias=config.mlp_bias) if moe is None
            else MoE(build.at("mlp"), width, moe)
        )  # fmt: skip
        self.mlp_post_norm = norm("mlp_post_norm", AFTER)

    def __call__(
        self, x: jax.Array, lane: Any, rope: tuple[jax.Array, jax.Array] | None, step: StepContext
    ) -> tuple[jax.Array, Any]:
        """`[T, M]` -> `[T, M]` and the layer's lane, or its state."""
        y = _normed(self.attention_norm, x)
        if isinstance(self.attention.spec, DeltaSpec):
            y, lane = self.attention(y, lane, step.states)
        else:
            y, lane = self.attention(y, lane, rope, step)
        x = x + _normed(self.attention_post_norm, y)
        y = _normed(self.mlp_norm, x)
        y = self.mlp(y, step) if isinstance(self.mlp, MoE) else self.mlp(y)
        return x + _normed(self.mlp_post_norm, y), lane


def _norm(build: Build, config: DecoderConfig) -> RMSNorm:
    """One of the model's width."""
    return RMSNorm(build, config.attention.width, config.norm_eps, axes.EMBED, config.norm_scaling)


def _normed(norm: RMSNorm | None, x: jax.Array) -> jax.Array:
    """As it is where there is no norm."""
    return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """Embedding, layers, final norm, head. Unrolled: a scan over stacked weights is three times slower."""

    def __init__(self, build: Build, config: DecoderConfig):
        self.config = config
        # A table that is only looked up gains nothing from int8.
        lookup = build if config.tied else build._replace(quantization=None)
        sizes, softcap = (config.vocab_size, config.attention.width), config.logit_softcap
        self.embedding = Embedding(
            lookup.at("embedding"), *sizes, head=config.tied, scale=config.embedding_scale, softcap=softcap
        )
        self.layers = nnx.List([Layer(build.at("layers", i), config, i) for i in range(config.num_layers)])
        self.norm = _norm(build.at("norm"), config)
        self.head = None if config.tied else Embedding(
            build.at("head"), *sizes, lookup=False, head=True, softcap=softcap
        )

    def __call__(
        self, tokens: jax.Array, step: StepContext, lanes: Cache, features: FeatureRows | None = None
    ) -> tuple[jax.Array, Cache]:
        """Token ids `[T]` -> hidden states `[T, M]` after the last norm, and the lanes as they now are.

        `features`: rows that some of the tokens take in the place of their own embedding.
        """
        x = self.embedding(tokens)
        if features is not None:
            rows = jnp.take(features.pool, features.index, axis=0, mode="clip").astype(x.dtype)
            x = jnp.where((features.index >= 0)[:, None], rows, x)
        ropes = [self.config.rope_of(number) for number in range(self.config.num_layers)]
        turned = {
            rope: None if rope is None else cos_sin(rope, step.positions, step.rope_lengths) for rope in dict.fromkeys(ropes)
        }
        lanes = list(lanes)
        for number, layer in enumerate(self.layers):
            lane = step.lane(number)
            x, lanes[lane] = layer(x, lanes[lane], turned[ropes[number]], step.of(number))
        return self.norm(x), lanes

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states `[B, M]` -> float32 logits `[B, V']`."""
        return (self.embedding if self.head is None else self.head).attend(hidden)

    def cache_specs(self) -> Sequence[Full | State]:
        """By the kind of each layer's attention."""
        return [layer.attention.cache_spec for layer in self.layers]


def weight_rules(config: DecoderConfig, *, fused: bool = False, names: MoENames = MoENames()) -> list[Rule]:
    """The names of the Llama lineage.

    Args:
        config: what the model consists of.
        fused: the checkpoint stacks qkv and gate/up itself (Phi-3).
        names: of layers with experts.
    """
    layer = "model.layers.{i}"
    gate_up = [("gate_up", ("gate", "up"))] if fused else [(part, (part,)) for part in ("gate", "up")]
    table = [
        Rule("model.embed_tokens.weight", "embedding.weight"),
        Rule("model.norm.weight", "norm.scale"),
        Rule("lm_head.weight", None if config.tied else "head.weight"),
        *(Rule(f"{layer}.{name}.weight", f"layers.{{i}}.{norm}.scale") for norm, name in _norm_names(config.norms)),
    ]

    def linear(name: str, target: str, parts: tuple[str, ...]) -> None:
        for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
            # Some checkpoints name an MLP as if it were a mixture.
            source, *also = (f"{layer}.{prefix}.{name}.{kind}" for prefix in names.prefixes)
            table.append(Rule(source, f"layers.{{i}}.mlp.{target}.{kind}", parts, tuple(also)))

    made, table = expand(table, config.num_layers), []
    for name, parts in gate_up:
        linear(f"{name}_proj", "gate_up", parts)
    linear("down_proj", "down", ())
    for i in range(config.num_layers):
        moe = config.moe_of(i)
        rules = _mixer_rules(config.attention_of(i), fused=fused)
        made += [rule.of_layer(i) for rule in rules + (table if moe is None else moe_rules(moe, names))]
    return made


def _mixer_rules(spec: Mixer, *, fused: bool) -> list[Rule]:
    """Of one layer's attention, whatever it is."""
    if isinstance(spec, AttentionSpec):
        return _attention_rules(spec, fused=fused)
    if isinstance(spec, LatentSpec):
        return mla_rules(query_rank=spec.query_rank is not None, bias=spec.bias)
    return kda_rules() if isinstance(spec, KdaSpec) else delta_net_rules()


def _attention_rules(spec: AttentionSpec, *, fused: bool) -> list[Rule]:
    qkv = [("qkv", ("q", "k", "v"))] if fused else [(part, (part,)) for part in ("q", "k", "v")]
    source, target, table = "model.layers.{i}.self_attn", "layers.{i}.attention", []
    linears = [*((name, "qkv", parts, spec.qkv_bias) for name, parts in qkv), ("o", "out", (), spec.out_bias)]
    for name, path, parts, bias in linears:
        for kind in ("weight", "bias") if bias else ("weight",):
            table.append(Rule(f"{source}.{name}_proj.{kind}", f"{target}.{path}.{kind}", parts))
    for part in ("q", "k") if spec.norm_eps is not None else ():
        path, outputs = ("norm_scale", (part,)) if spec.norm_whole else (f"{part}_norm.scale", ())
        table.append(Rule(f"{source}.{part}_norm.weight", f"{target}.{path}", outputs))
    if spec.sinks:
        table.append(Rule(f"{source}.sinks", f"{target}.sinks", ("sinks",)))
    return table


def _norm_names(norms: Sequence[str]) -> list[tuple[str, str]]:
    """Of the layer's norms: their paths here and their names in checkpoints, which say after or before what they stand."""
    before = [("attention_norm", "input_layernorm")]
    if AFTER not in norms:
        return [*before, ("mlp_norm", "post_attention_layernorm")]
    after = [("attention_post_norm", "post_attention_layernorm"), ("mlp_post_norm", "post_feedforward_layernorm")]
    return [*before, ("mlp_norm", "pre_feedforward_layernorm"), *after] if BEFORE in norms else after
