"""The decoder stack that Llama and its relatives share: pre-norm attention and gated MLP, unrolled."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.checkpoint.hf import ConfigReader
from jaxinfer.checkpoint.rules import Rule, expand
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.paged import Lane
from jaxinfer.kv.spec import Full
from jaxinfer.layers.attention import Attention, AttentionSpec, StepContext
from jaxinfer.layers.embedding import Embedding
from jaxinfer.layers.mlp import ACTIVATIONS, GatedMLP
from jaxinfer.layers.norms import RMSNorm
from jaxinfer.layers.params import Build
from jaxinfer.layers.rope import RopeConfig, cos_sin
from jaxinfer.models.base import FeatureRows, Features
from jaxinfer.sharding import axes


FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, by the names that config.json has for them in `layer_types`."""


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
    attention: AttentionSpec
    rope: RopeConfig
    max_position: int
    """Positions the model was made for."""
    window: int | None = None
    """Positions that a token sees in layers of kind `SLIDING`, itself included."""
    kinds: tuple[str, ...] = ()
    """One a layer, `FULL` or `SLIDING`; none: all are full."""
    recomputed: bool = False
    """Whether a sequence is computed again where longrope's frequencies change (Phi-3)."""
    mlp_bias: bool = False
    tied: bool = False
    """The head is the embedding."""
    features: Features | None = None
    """Nothing is read beside tokens."""

    @property
    def query_group(self) -> int:
        """Query heads that share a kv head."""
        return self.attention.heads // self.attention.kv_heads

    @property
    def max_length(self) -> int:
        """The longest sequence whose numbers are the model's own."""
        stretch = self.rope.factor if self.rope.kind in ("linear", "dynamic") else 1.0
        return int(self.max_position * stretch)

    def attention_of(self, layer: int) -> AttentionSpec:
        """The shape of one layer's attention."""
        slides = self.kinds and self.kinds[layer] == SLIDING
        return replace(self.attention, window=self.window) if slides else self.attention

    def length_key(self, prompt_length: int) -> bytes:
        """What of a prompt's length changes its keys (rope scalings that follow the length)."""
        return self.rope.length_key(prompt_length)

    @property
    def recompute_after(self) -> int | None:
        """longrope has other frequencies beyond its original length."""
        return self.rope.original_max_position if self.recomputed and self.rope.kind == "longrope" else None


def read_config(
    reader: ConfigReader, *, qkv_bias: bool = False, out_bias: bool = False, qk_norm: bool = False,
    mlp_bias: bool = False, window: int | None = None, kinds: Sequence[str] = (), partial_rotary: bool = False,
) -> DecoderConfig:  # fmt: skip
    """The attributes that all families of this stack name alike.

    `kinds`: of the layers, where a window is not that of all of them (`layer_kinds`).

    Raises:
        ConfigError: sizes that do not fit each other, an unknown activation or rope.
    """
    width, heads = reader.get_int("hidden_size"), reader.get_int("num_attention_heads")
    kv_heads = reader.get_int("num_key_value_heads", heads)
    head_dim = reader.get_int("head_dim", None) or _divide("hidden_size", width, "num_attention_heads", heads)
    _divide("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    activation = reader.get_str("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"config.json: hidden_act is {activation!r}; supported: {', '.join(ACTIVATIONS)}")
    eps = reader.get_float("rms_norm_eps", 1e-6)
    rope = reader.rope(head_dim)
    if rope.rotary_dim != head_dim and not partial_rotary:
        raise ConfigError(
            f"config.json: rope turns {rope.rotary_dim} of {head_dim} dimensions (partial_rotary_factor), which "
            f"{reader.family} does not know; leave it out or use a family that does (Phi3ForCausalLM)"
        )
    spec = AttentionSpec(width, heads, kv_heads, head_dim, qkv_bias, out_bias, eps if qk_norm else None)
    layers = reader.get_int("num_hidden_layers")
    if window is None and SLIDING in kinds:
        raise ConfigError(f"config.json: layer_types names {SLIDING}, but there is no sliding_window in use; give its size")
    return DecoderConfig(
        vocab_size=reader.get_int("vocab_size"), num_layers=layers,
        ffn=reader.get_int("intermediate_size"), activation=activation, norm_eps=eps, attention=spec,
        rope=rope, max_position=reader.get_int("max_position_embeddings"), window=window,
        kinds=tuple(kinds) or ((SLIDING if window else FULL),) * layers,
        mlp_bias=mlp_bias, tied=reader.get_bool("tie_word_embeddings", False),
    )  # fmt: skip


def layer_kinds(reader: ConfigReader, default: Sequence[str]) -> tuple[str, ...]:
    """`layer_types` of config.json, one a layer; `default` where it is absent.

    Raises:
        ConfigError: of another length, or with a kind that this stack has not.
    """
    kinds, layers = reader.get("layer_types", list(default)), reader.get_int("num_hidden_layers")
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(f"config.json: layer_types must be a list of num_hidden_layers = {layers} kinds, got {kinds!r}")
    for number, kind in enumerate(kinds):
        if kind not in (FULL, SLIDING):
            raise ConfigError(
                f"config.json: layer_types[{number}] is {kind!r}, which {reader.family} does not know; it may be {FULL!r} "
                f"or {SLIDING!r}"
            )
    return tuple(kinds)


def _divide(name: str, size: int, by_name: str, by: int) -> int:
    if size % by:
        raise ConfigError(f"config.json: {name} is {size}, which {by_name} = {by} does not divide")
    return size // by


class Layer(nnx.Module):
    """One block: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, build: Build, config: DecoderConfig, number: int):
        width = config.attention.width
        self.attention_norm = RMSNorm(build.at("attention_norm"), width, config.norm_eps, axes.EMBED)
        self.attention = Attention(build.at("attention"), config.attention_of(number))
        self.mlp_norm = RMSNorm(build.at("mlp_norm"), width, config.norm_eps, axes.EMBED)
        self.mlp = GatedMLP(build.at("mlp"), width, config.ffn, config.activation, bias=config.mlp_bias)

    def __call__(
        self, x: jax.Array, lane: Lane, rope: tuple[jax.Array, jax.Array], step: StepContext
    ) -> tuple[jax.Array, Lane]:
        """`[T, M]` -> `[T, M]` and the layer's lane."""
        y, lane = self.attention(self.attention_norm(x), lane, rope, step)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), lane


class Decoder(nnx.Module):
    """Embedding, layers, final norm, head. Unrolled: a scan over stacked weights is three times slower."""

    def __init__(self, build: Build, config: DecoderConfig):
        self.config = config
        # A table that is only looked up gains nothing from int8.
        lookup = build if config.tied else build._replace(quantization=None)
        self.embedding = Embedding(lookup.at("embedding"), config.vocab_size, config.attention.width, head=config.tied)
        self.layers = nnx.List([Layer(build.at("layers", i), config, i) for i in range(config.num_layers)])
        self.norm = RMSNorm(build.at("norm"), config.attention.width, config.norm_eps, axes.EMBED)
        self.head = None if config.tied else Embedding(
            build.at("head"), config.vocab_size, config.attention.width, lookup=False, head=True
        )

    def __call__(
        self, tokens: jax.Array, step: StepContext, lanes: list[Lane], features: FeatureRows | None = None
    ) -> tuple[jax.Array, list[Lane]]:
        """Token ids `[T]` -> hidden states `[T, M]` after the last norm, and the lanes as they now are.

        `features`: rows that some of the tokens take in the place of their own embedding.
        """
        x = self.embedding(tokens)
        if features is not None:
            rows = jnp.take(features.pool, features.index, axis=0, mode="clip").astype(x.dtype)
            x = jnp.where((features.index >= 0)[:, None], rows, x)
        rope = cos_sin(self.config.rope, step.positions, step.rope_lengths)
        lanes = list(lanes)
        for number, layer in enumerate(self.layers):
            lane = step.lane(number)
            x, lanes[lane] = layer(x, lanes[lane], rope, step.of(number))
        return self.norm(x), lanes

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states `[B, M]` -> float32 logits `[B, V']`."""
        return (self.embedding if self.head is None else self.head).attend(hidden)

    def cache_specs(self) -> Sequence[Full]:
        """By the kind of each layer's attention."""
        return [layer.attention.cache_spec for layer in self.layers]


def weight_rules(config: DecoderConfig, *, fused: bool = False) -> list[Rule]:
    """The names of the Llama lineage; `fused`: the checkpoint stacks qkv and gate/up itself (Phi-3)."""
    spec, layer = config.attention, "model.layers.{i}"
    qkv = [("qkv", ("q", "k", "v"))] if fused else [(part, (part,)) for part in ("q", "k", "v")]
    gate_up = [("gate_up", ("gate", "up"))] if fused else [(part, (part,)) for part in ("gate", "up")]
    table = [
        Rule("model.embed_tokens.weight", "embedding.weight"),
        Rule("model.norm.weight", "norm.scale"),
        Rule("lm_head.weight", None if config.tied else "head.weight"),
        Rule(f"{layer}.input_layernorm.weight", "layers.{i}.attention_norm.scale"),
        Rule(f"{layer}.post_attention_layernorm.weight", "layers.{i}.mlp_norm.scale"),
    ]

    def linear(sources: str, target: str, parts: tuple[str, ...], bias: bool) -> None:
        for kind in ("weight", "bias") if bias else ("weight",):
            table.append(Rule(f"{layer}.{sources}.{kind}", f"layers.{{i}}.{target}.{kind}", parts))

    for name, parts in qkv:
        linear(f"self_attn.{name}_proj", "attention.qkv", parts, spec.qkv_bias)
    for name, parts in gate_up:
        linear(f"mlp.{name}_proj", "mlp.gate_up", parts, config.mlp_bias)
    linear("self_attn.o_proj", "attention.out", (), spec.out_bias)
    linear("mlp.down_proj", "mlp.down", (), config.mlp_bias)
    if spec.norm_eps is not None:
        for part in ("q", "k"):
            table.append(Rule(f"{layer}.self_attn.{part}_norm.weight", f"layers.{{i}}.attention.{part}_norm.scale"))
    return expand(table, config.num_layers)
