"""Configuration of decoders of the Llama lineage, and the config.json attributes that its families share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from jaxinfer.checkpoint.hf import ConfigReader
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.errors import ConfigError
from jaxinfer.layers.attention import AttentionSpec
from jaxinfer.layers.delta_net import DeltaNetSpec
from jaxinfer.layers.kda import KdaSpec
from jaxinfer.layers.mla import LatentSpec
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.moe import MoEConfig
from jaxinfer.layers.norms import Scaling
from jaxinfer.layers.rope import RopeConfig
from jaxinfer.models.base import CrossSource, Features
from jaxinfer.models.decoder_attributes import one_values

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
"""Kinds of layers, as named in `layer_types` of config.json."""

BEFORE, AFTER = "before", "after"
"""Position of an RMSNorm: on the input of attention or the MLP, or on the output before the residual is added."""

Mixer: TypeAlias = AttentionSpec | LatentSpec | KdaSpec | DeltaNetSpec
"""Token mixer of a layer (attention, MLA, KDA, gated DeltaNet)."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and options of a decoder."""

    vocab_size: int
    """V: vocabulary size."""
    num_layers: int
    ffn: int
    """F: feed-forward width."""
    activation: str
    norm_eps: float
    attention: AttentionSpec | LatentSpec
    rope: RopeConfig | None
    """Rotary embedding; None if attention uses no positional encoding."""
    max_position: int
    """Maximum number of positions the model was trained for."""
    local_rope: RopeConfig | None = None
    """Rotary embedding of `SLIDING` layers; None if it is the same as `rope`."""
    norms: tuple[str, ...] = (BEFORE,)
    """Norms around attention and the MLP: `BEFORE`, `AFTER`, or both (Gemma 2)."""
    norm_scaling: Scaling = Scaling()
    """Scaling of all norms of width M."""
    centred_norms: bool = False
    """Whether norms of width M subtract the mean first (a LayerNorm without bias, Cohere); otherwise they are
    RMSNorms.
    """
    embedding_scale: float | None = None
    """Factor on token embeddings; None for 1."""
    round_embedding_scale: bool = True
    """Whether `embedding_scale` is rounded to the dtype of the embeddings first (Gemma)."""
    logit_scale: float | None = None
    """Factor on the logits (Cohere, Granite); None for 1."""
    logit_softcap: float | None = None
    """Softcap: logits x become cap * tanh(x / cap) (Gemma 2, arXiv:2408.00118); None for no cap."""
    window: int | None = None
    """Window of `SLIDING` layers: number of positions visible to a token, itself included."""
    kinds: tuple[str, ...] = ()
    """Kind of each layer, `FULL`, `SLIDING` or `LINEAR`; empty if all are full."""
    linear: KdaSpec | DeltaNetSpec | None = None
    """Token mixer of `LINEAR` layers, which have a recurrent state."""
    recomputed: bool = False
    """Whether a sequence is recomputed when longrope's frequencies change (Phi-3)."""
    mlp_bias: bool = False
    moe: MoEConfig | None = None
    """Mixture of experts of the layers that have one in place of an MLP."""
    dense_layers: tuple[int, ...] = ()
    """Layers with an MLP although `moe` is set."""
    tied: bool = False
    """Whether the output head is the token embedding."""
    features: Features | None = None
    """Encoder inputs that replace token embeddings; None here."""
    cross: CrossSource | None = None
    """Encoder inputs for cross-attention; None here."""

    def __post_init__(self) -> None:
        """Refuse inconsistent combinations of fields.

        Raises:
            ValueError: the fields and their values. This indicates an error in a family's code: invalid values of
                config.json are refused earlier, by `read_config`.
        """
        layers = self.num_layers
        if self.kinds and len(self.kinds) != layers:
            raise ValueError(f"kinds has {len(self.kinds)} entries for num_layers={layers}; give one a layer")
        if SLIDING in self.kinds and self.window is None:
            raise ValueError("kinds has sliding layers, but window is None; give the window")
        if LINEAR in self.kinds and self.linear is None:
            raise ValueError("kinds has linear layers, but linear is None; give their spec")
        if self.dense_layers and self.moe is None:
            raise ValueError(
                f"dense_layers={self.dense_layers}, but moe is None, so every layer is dense; leave dense_layers empty"
            )
        if not all(0 <= layer < layers for layer in self.dense_layers):
            raise ValueError(f"dense_layers={self.dense_layers} must be layers from 0 to {layers - 1}")
        if not self.norms or not set(self.norms) <= {BEFORE, AFTER}:
            raise ValueError(f"norms={self.norms} must be {BEFORE!r}, {AFTER!r} or both")
        if self.centred_norms and self.norm_scaling != Scaling():
            raise ValueError(f"norm_scaling={self.norm_scaling} applies to RMSNorm only, but centred_norms is set")
        if self.recomputed and self.rope is None:
            raise ValueError("recomputed is for models whose rope changes with length, but rope is None")

    @property
    def query_group(self) -> int:
        """Number of query heads per kv head."""
        spec = self.attention
        return spec.heads if isinstance(spec, LatentSpec) else spec.heads // spec.kv_heads

    @property
    def max_length(self) -> int:
        """Maximum sequence length that the model supports."""
        # With separate ropes per kind of layer, max_position_embeddings is already the stretched length.
        if self.rope is None or self.local_rope is not None:
            return self.max_position
        return max(self.max_position, self.rope.stretched_length)

    def slides(self, layer: int) -> bool:
        """Return whether a layer has a sliding window."""
        return bool(self.kinds) and self.kinds[layer] == SLIDING

    def attention_of(self, layer: int) -> Mixer:
        """Return the token mixer of a layer."""
        if self.kinds and self.kinds[layer] == LINEAR:
            return self.linear
        return replace(self.attention, window=self.window) if self.slides(layer) else self.attention

    def rope_of(self, layer: int) -> RopeConfig | None:
        """Return the rotary embedding of a layer."""
        return self.local_rope if self.local_rope is not None and self.slides(layer) else self.rope

    def moe_of(self, layer: int) -> MoEConfig | None:
        """Return the mixture of experts of a layer, or None if it has an MLP."""
        return None if layer in self.dense_layers else self.moe

    def length_key(self, prompt_length: int) -> bytes:
        """Return a salt for prefix hashes: keys depend on the prompt's length with some rope scalings."""
        ropes = [rope for rope in (self.rope, self.local_rope) if rope is not None]
        return b",".join(rope.length_key(prompt_length) for rope in ropes)

    @property
    def recompute_after(self) -> int | None:
        """Original length of longrope, beyond which its frequencies change; None for other models."""
        longrope = self.recomputed and self.rope is not None and self.rope.kind == "longrope"
        return self.rope.original_max_position if longrope else None


class CompositeConfig:
    """Mixin for configurations of models around a decoder: passes on what the decoder's configuration says."""

    text: DecoderConfig

    @property
    def vocab_size(self) -> int:
        """V: vocabulary size."""
        return self.text.vocab_size

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.text.num_layers

    @property
    def query_group(self) -> int:
        """Number of query heads per kv head."""
        return self.text.query_group

    @property
    def max_length(self) -> int:
        """Maximum sequence length that the model supports."""
        return self.text.max_length

    def length_key(self, prompt_length: int) -> bytes:
        """Return a salt for prefix hashes: keys may depend on the prompt's length."""
        return self.text.length_key(prompt_length)

    @property
    def recompute_after(self) -> int | None:
        """Length in tokens beyond which rope changes for the whole sequence, or None."""
        return self.text.recompute_after


def read_config(
    reader: ConfigReader,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: bool = False,
    mlp_bias: bool = False,
    window: int | None = None,
    kinds: Sequence[str] = (),
    partial_rotary: bool = False,
    moe: MoEConfig | None = None,
    dense_layers: Sequence[int] = (),
    activation: str = "hidden_act",
    local_rope: Mapping[str, Any] | None = None,
    norm_eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    linear: KdaSpec | DeltaNetSpec | None = None,
) -> DecoderConfig:
    """Read the config.json attributes that all families of this stack share; require fixed values of unsupported ones.

    Args:
        reader: config.json.
        qkv_bias, out_bias, qk_norm, mlp_bias: whether q, k and v, the output of attention, and the MLP have biases;
            whether queries and keys have norms.
        window: sliding window in tokens; None for none.
        kinds: kind of each layer, if the window does not apply to all of them (`layer_kinds`).
        partial_rotary: whether the family supports ropes on a part of a head's dimensions.
        moe: mixture of experts of all layers but `dense_layers`.
        dense_layers: layers with an MLP.
        activation: name of the activation's attribute.
        local_rope: rope attributes that differ for sliding layers, if config.json does not state both.
        norm_eps: name of the norm epsilon's attribute and its default.
        linear: token mixer of `LINEAR` layers.

    Raises:
        ConfigError: sizes do not fit each other, or an activation or rope is unknown.
    """
    width, heads = reader.get_int("hidden_size"), reader.get_int("num_attention_heads")
    kv_heads = reader.get_int("num_key_value_heads", heads)
    head_dim = reader.get_int("head_dim", None) or reader.divide("hidden_size", width, "num_attention_heads", heads)
    reader.divide("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    chosen = reader.get_choice(activation, "silu", ACTIVATIONS)
    reader.restrict(one_values(qk_norm=qk_norm, experts=moe is not None))
    eps = reader.get_float(*norm_eps, above=0)
    rope, local = _ropes(reader, head_dim, local_rope)
    turned = min(one.rotary_dim for one in (rope, local) if one is not None)
    if turned != head_dim and not partial_rotary:
        raise ConfigError(
            f"config.json: rope turns {turned} of {head_dim} dimensions (partial_rotary_factor), which "
            f"{reader.family} does not support; remove it, or use a family that does (Phi3ForCausalLM)"
        )
    spec = AttentionSpec(width, heads, kv_heads, head_dim, qkv_bias, out_bias, eps if qk_norm else None)
    layers = reader.get_int("num_hidden_layers")
    if window is None and SLIDING in kinds:
        raise ConfigError(
            f"config.json: layer_types names {SLIDING}, but no sliding_window is set or enabled; add its size"
        )
    return DecoderConfig(
        vocab_size=reader.get_int("vocab_size"),
        num_layers=layers,
        ffn=reader.get_int("intermediate_size"),
        activation=chosen,
        norm_eps=eps,
        attention=spec,
        rope=rope,
        local_rope=local,
        max_position=reader.get_int("max_position_embeddings"),
        window=window,
        kinds=tuple(kinds) or ((SLIDING if window else FULL),) * layers,
        linear=linear,
        mlp_bias=mlp_bias,
        moe=moe,
        dense_layers=tuple(dense_layers),
        tied=reader.get_bool("tie_word_embeddings", False),
    )


def window_of(reader: ConfigReader) -> int | None:
    """Read `sliding_window`, the number of positions visible to a token; null and 0 mean no window."""
    return reader.get_int("sliding_window", None, least=0) or None


def layer_kinds(
    reader: ConfigReader, default: Sequence[str], known: Sequence[str] = (FULL, SLIDING)
) -> tuple[str, ...]:
    """Read `layer_types` of config.json, one kind per layer; return `default` if it is absent.

    Raises:
        ConfigError: the length is wrong, or a kind is not in `known`.
    """
    kinds, layers = reader.get("layer_types", list(default)), reader.get_int("num_hidden_layers")
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(
            f"config.json: layer_types must be a list of num_hidden_layers = {layers} kinds, got {show(kinds)}"
        )
    for number, kind in enumerate(kinds):
        if kind not in known:
            raise ConfigError(
                f"config.json: layer_types[{number}] is {show(kind)}, which {reader.family} does not support; it "
                f"must be {' or '.join(map(repr, known))}"
            )
    return tuple(kinds)


def _ropes(
    reader: ConfigReader, head_dim: int, local: Mapping[str, Any] | None
) -> tuple[RopeConfig, RopeConfig | None]:
    """Read the ropes of full and of sliding layers; `local` has the attributes that differ for the latter.

    `rope_parameters` may have an object per kind, as written by transformers 5; it states everything but the base, for
    which the family may have a default.
    """
    each = reader.get("rope_parameters", None)
    if not isinstance(each, Mapping) or {FULL, SLIDING}.isdisjoint(each):
        if local and isinstance(each, Mapping) and each:
            raise ConfigError(
                f"config.json: rope_parameters is {show(each)}; {reader.family} has a rope per kind of layer: put them "
                f"in rope_parameters.{FULL} and rope_parameters.{SLIDING}"
            )
        rope = reader.rope(head_dim)
        return rope, None if local is None else reader.rope(head_dim, **local)
    return _ropes_of_kinds(reader, head_dim, each, local or {})


def _ropes_of_kinds(
    reader: ConfigReader, head_dim: int, each: Mapping[str, Any], local: Mapping[str, Any]
) -> tuple[RopeConfig, RopeConfig]:
    """Read the ropes of full and of sliding layers from `rope_parameters` with an object per kind.

    A kind without one has the default rope, and `rope_scaling` is that of full layers, as in transformers.
    """
    unknown = sorted(set(each) - {FULL, SLIDING})
    if unknown:
        raise ConfigError(
            f"config.json: rope_parameters has unknown keys {', '.join(unknown)} beside {FULL} and {SLIDING}"
        )
    stated = {kind: each.get(kind) or {} for kind in (FULL, SLIDING)}
    for kind, own in stated.items():
        if not isinstance(own, Mapping):
            raise ConfigError(f"config.json: rope_parameters.{kind} is {show(own)}; it must be an object")
    if not any(stated.values()):
        raise ConfigError(
            f"config.json: rope_parameters.{FULL} and rope_parameters.{SLIDING} are both empty; set at least one"
        )
    scaling = reader.get("rope_scaling", None) or {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"config.json: rope_scaling is {show(scaling)}; it must be an object")
    bases = {FULL: reader.get("rope_theta", None)}
    bases[SLIDING] = local.get("rope_theta", bases[FULL])
    for kind, name in ((FULL, "rope_theta"), (SLIDING, "rope_local_base_freq")):
        outer, inner = reader.config.get(name), stated[kind].get("rope_theta")
        if outer is not None and inner is not None and outer != inner:
            raise ConfigError(
                f"config.json: {name}={show(outer)} contradicts rope_parameters.{kind}.rope_theta={show(inner)}; state "
                f"one of them, for instance with hf_overrides={{{name!r}: None}}"
            )
    if not local:  # one rope for all layers, whichever kind states it
        stated = {FULL: stated[FULL] or stated[SLIDING], SLIDING: stated[SLIDING] or stated[FULL]}
    kind = (
        {"rope_type": scaling["type"]} if scaling.get("type") else {}
    )  # the older name, which must not lose to "default"
    stated[FULL] = {**stated[FULL], **kind, **scaling}
    full, sliding = (
        reader.rope(
            head_dim,
            rope_scaling=None,
            rope_theta=None,
            rope_parameters={**({} if bases[kind] is None else {"rope_theta": bases[kind]}), **own},
        )
        for kind, own in stated.items()
    )
    return full, sliding
