"""Read the config.json attributes that decoder families share."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.errors import ConfigError
from jaxinfer.layers.attention import AttentionSpec
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.moe import MoEConfig
from jaxinfer.layers.rope import RopeConfig
from jaxinfer.models.decoder_attributes import one_values
from jaxinfer.models.decoder_config import FULL, SLIDING, DecoderConfig, Linear


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
    linear: Linear | None = None,
    full_heads: tuple[int, int] | None = None,
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
        full_heads: kv heads and head dim of full layers, if only sliding layers have those of config.json.

    Raises:
        ConfigError: sizes do not fit each other, or an activation or rope is unknown.
    """
    eps = reader.get_float(*norm_eps, above=0)
    attention = _attention_spec(reader, qkv_bias, out_bias, eps if qk_norm else None)
    chosen = reader.get_choice(activation, "silu", ACTIVATIONS)
    reader.restrict(one_values(qk_norm=qk_norm, experts=moe is not None))
    sliding = attention
    if full_heads is not None:
        attention = replace(attention, kv_heads=full_heads[0], head_dim=full_heads[1])
        reader.divide("num_attention_heads", attention.heads, "the number of kv heads of full layers", full_heads[0])
    rope, local = _ropes(reader, (attention.head_dim, sliding.head_dim), local_rope)
    if not partial_rotary:
        _refuse_partial_rope(reader, rope, local)
    layers = reader.get_int("num_hidden_layers")
    return DecoderConfig(
        vocab_size=reader.get_int("vocab_size"),
        num_layers=layers,
        ffn=reader.get_int("intermediate_size"),
        activation=chosen,
        norm_eps=eps,
        attention=attention,
        local_attention=None if full_heads is None else sliding,
        rope=rope,
        local_rope=local,
        max_position=reader.get_int("max_position_embeddings"),
        window=window,
        kinds=_checked_kinds(kinds, window) or ((SLIDING if window else FULL),) * layers,
        linear=linear,
        mlp_bias=mlp_bias,
        moe=moe,
        dense_layers=tuple(dense_layers),
        tied=reader.get_bool("tie_word_embeddings", False),
    )


def _checked_kinds(kinds: Sequence[str], window: int | None) -> tuple[str, ...]:
    """Return the kinds of layers; refuse sliding ones without a window."""
    if window is None and SLIDING in kinds:
        raise ConfigError(
            f"config.json: layer_types names {SLIDING}, but no sliding_window is set or enabled; add its size"
        )
    return tuple(kinds)


def _attention_spec(reader: ConfigReader, qkv_bias: bool, out_bias: bool, norm_eps: float | None) -> AttentionSpec:
    """Read the sizes of self-attention."""
    width, heads = reader.get_int("hidden_size"), reader.get_int("num_attention_heads")
    kv_heads = reader.get_int("num_key_value_heads", heads)
    head_dim = reader.get_int("head_dim", None) or reader.divide("hidden_size", width, "num_attention_heads", heads)
    reader.divide("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    return AttentionSpec(width, heads, kv_heads, head_dim, qkv_bias, out_bias, norm_eps)


def _refuse_partial_rope(reader: ConfigReader, rope: RopeConfig, local: RopeConfig | None) -> None:
    """Refuse a rope that rotates a part of a head's dimensions."""
    for one in (rope, local):
        if one is not None and one.rotary_dim != one.head_dim:
            raise ConfigError(
                f"config.json: rope rotates {one.rotary_dim} of {one.head_dim} dimensions (partial_rotary_factor), "
                f"which {reader.family} does not support; remove it, or use a family that does (Phi3ForCausalLM)"
            )


def text_part(reader: ConfigReader, others: Sequence[str]) -> ConfigReader:
    """Return the reader of `text_config`, or `reader` itself for a model of text alone.

    Args:
        reader: config.json.
        others: attributes beside `text_config` that do not concern text.
    """
    if not reader.has("text_config"):
        return reader
    tied = reader.get_bool("tie_word_embeddings", None)
    reader.skip(*others)
    return reader.part("text_config", **{} if tied is None else {"tie_word_embeddings": tied})


def default_rotary_part(reader: ConfigReader, factor: float) -> None:
    """Set the default of `partial_rotary_factor`, which may stand beside `rope_parameters` or in it."""
    stated = reader.get("rope_parameters", None) or {}
    if not isinstance(stated, dict) or "partial_rotary_factor" not in stated:
        reader.defaults(partial_rotary_factor=factor)


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
    reader: ConfigReader, head_dims: tuple[int, int], local: Mapping[str, Any] | None
) -> tuple[RopeConfig, RopeConfig | None]:
    """Read the ropes of full and of sliding layers, by their head dims; `local` has what differs for the latter.

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
        rope = reader.rope(head_dims[0])
        return rope, None if local is None else reader.rope(head_dims[1], **local)
    return _ropes_of_kinds(reader, head_dims, each, local or {})


def _ropes_of_kinds(
    reader: ConfigReader, head_dims: tuple[int, int], each: Mapping[str, Any], local: Mapping[str, Any]
) -> tuple[RopeConfig, RopeConfig]:
    """Read the ropes of full and of sliding layers from `rope_parameters` with an object per kind.

    A kind without one has the default rope, and `rope_scaling` is that of full layers, as in transformers.
    """
    stated = _stated_ropes(reader, each)
    scaling = reader.get("rope_scaling", None) or {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"config.json: rope_scaling is {show(scaling)}; it must be an object")
    bases = {FULL: reader.get("rope_theta", None)}
    bases[SLIDING] = local.get("rope_theta", bases[FULL])
    if not local:  # one rope for all layers, whichever kind states it
        stated = {FULL: stated[FULL] or stated[SLIDING], SLIDING: stated[SLIDING] or stated[FULL]}
    # "type" is the older name of "rope_type", and must take precedence over a stated "default".
    kind = {"rope_type": scaling["type"]} if scaling.get("type") else {}
    stated[FULL] = {**stated[FULL], **kind, **scaling}
    full, sliding = (
        reader.rope(
            head_dim,
            rope_scaling=None,
            rope_theta=None,
            rope_parameters={**({} if bases[kind] is None else {"rope_theta": bases[kind]}), **own},
        )
        for (kind, own), head_dim in zip(stated.items(), head_dims, strict=True)
    )
    return full, sliding


def _stated_ropes(reader: ConfigReader, each: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the object of each kind in `rope_parameters`, {} for a kind without one.

    Raises:
        ConfigError: a key or value is invalid, both objects are empty, or one contradicts a field beside them.
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
    for kind, name in ((FULL, "rope_theta"), (SLIDING, "rope_local_base_freq")):
        outer, inner = reader.config.get(name), stated[kind].get("rope_theta")
        if outer is not None and inner is not None and outer != inner:
            raise ConfigError(
                f"config.json: {name}={show(outer)} contradicts rope_parameters.{kind}.rope_theta={show(inner)}; state "
                f"one of them, for instance with hf_overrides={{{name!r}: None}}"
            )
    return stated
