"""What shapes a decoder of the Llama lineage, and the attributes of config.json that its families name alike."""

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
"""Kinds of layers, by the names that config.json has for them in `layer_types`."""

BEFORE, AFTER = "before", "after"
"""Where an RMSNorm stands: on what attention or the MLP takes, or on what it gives, before that is added."""

Mixer: TypeAlias = AttentionSpec | LatentSpec | KdaSpec | DeltaNetSpec
"""How the tokens of a sequence come together in a layer."""


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
    centred_norms: bool = False
    """Whether norms of the model's width subtract the mean first (a LayerNorm without a bias, Cohere); False:
    RMSNorm."""
    embedding_scale: float | None = None
    """Multiplies the embeddings of tokens; None: they stay."""
    round_embedding_scale: bool = True
    """Whether `embedding_scale` is rounded to the dtype of the embeddings first (Gemma)."""
    logit_scale: float | None = None
    """Multiplies the logits (Cohere, Granite); None: they stay."""
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

    def __post_init__(self) -> None:
        """Refuse combinations of fields that no model can have.

        Raises:
            ValueError: the fields and their values. These are faults of a family's code: what config.json says wrong is
                refused by `read_config` before.
        """
        layers = self.num_layers
        if self.kinds and len(self.kinds) != layers:
            raise ValueError(f"kinds has {len(self.kinds)} entries for num_layers={layers}; give one a layer")
        if SLIDING in self.kinds and self.window is None:
            raise ValueError("kinds has sliding layers, but window is None; give the window")
        if LINEAR in self.kinds and self.linear is None:
            raise ValueError("kinds has linear layers, but linear is None; give their spec")
        if self.dense_layers and self.moe is None:
            raise ValueError(f"dense_layers={self.dense_layers}, but moe is None: every layer is dense then")
        if not all(0 <= layer < layers for layer in self.dense_layers):
            raise ValueError(f"dense_layers={self.dense_layers} must be layers from 0 to {layers - 1}")
        if not self.norms or not set(self.norms) <= {BEFORE, AFTER}:
            raise ValueError(f"norms={self.norms} must be {BEFORE!r}, {AFTER!r} or both")
        if self.centred_norms and self.norm_scaling != Scaling():
            raise ValueError(f"norm_scaling={self.norm_scaling} is for RMSNorm, but centred_norms is set")
        if self.recomputed and self.rope is None:
            raise ValueError("recomputed is for models whose rope changes with length, but rope is None")

    @property
    def query_group(self) -> int:
        """Query heads that share a kv head."""
        spec = self.attention
        return spec.heads if isinstance(spec, LatentSpec) else spec.heads // spec.kv_heads

    @property
    def max_length(self) -> int:
        """The longest sequence whose numbers are the model's own."""
        # Where kinds of layers have ropes of their own, what config.json says is the stretched length already.
        if self.rope is None or self.local_rope is not None:
            return self.max_position
        return max(self.max_position, self.rope.stretched_length)

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


class AroundDecoder:
    """Of a model whose text goes through a decoder of this stack: what the decoder's configuration says of both."""

    text: DecoderConfig

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.text.vocab_size

    @property
    def num_layers(self) -> int:
        """Of the decoder."""
        return self.text.num_layers

    @property
    def query_group(self) -> int:
        """Query heads that share a kv head."""
        return self.text.query_group

    @property
    def max_length(self) -> int:
        """The longest sequence whose numbers are the model's own."""
        return self.text.max_length

    def length_key(self, prompt_length: int) -> bytes:
        """What of a prompt's length changes its keys."""
        return self.text.length_key(prompt_length)

    @property
    def recompute_after(self) -> int | None:
        """Tokens after which the positions of the whole sequence change."""
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
    """Read the attributes that all families of this stack name alike, and require one value of those it has not.

    `kinds`: of the layers, where a window is not that of all of them (`layer_kinds`).
    `moe`: the experts of all but the `dense_layers`.
    `activation`: what config.json calls it.
    `local_rope`: what is different about the rope of sliding layers, where config.json has not one of each kind.
    `norm_eps`: what config.json calls the epsilon of norms, and its default.
    `linear`: the layers of kind `LINEAR`.

    Raises:
        ConfigError: sizes that do not fit each other, an unknown activation or rope.
    """
    width, heads = reader.get_int("hidden_size"), reader.get_int("num_attention_heads")
    kv_heads = reader.get_int("num_key_value_heads", heads)
    head_dim = reader.get_int("head_dim", None) or reader.divide("hidden_size", width, "num_attention_heads", heads)
    reader.divide("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    chosen = reader.get_choice(activation, "silu", ACTIVATIONS)
    reader.require(one_values(qk_norm=qk_norm, experts=moe is not None))
    eps = reader.get_float(*norm_eps, above=0)
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
        raise ConfigError(
            f"config.json: layer_types names {SLIDING}, but there is no sliding_window in use; give its size"
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
    """Read `sliding_window`, the positions that a token sees; null and 0 mean that it sees all."""
    return reader.get_int("sliding_window", None, least=0) or None


def layer_kinds(
    reader: ConfigReader, default: Sequence[str], known: Sequence[str] = (FULL, SLIDING)
) -> tuple[str, ...]:
    """`layer_types` of config.json, one a layer; `default` where it is absent. `known`: to the family.

    Raises:
        ConfigError: of another length, or with a kind that this stack has not.
    """
    kinds, layers = reader.get("layer_types", list(default)), reader.get_int("num_hidden_layers")
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(
            f"config.json: layer_types must be a list of num_hidden_layers = {layers} kinds, got {show(kinds)}"
        )
    for number, kind in enumerate(kinds):
        if kind not in known:
            raise ConfigError(
                f"config.json: layer_types[{number}] is {show(kind)}, which {reader.family} does not know; it may be "
                f"{' or '.join(map(repr, known))}"
            )
    return tuple(kinds)


def _ropes(
    reader: ConfigReader, head_dim: int, local: Mapping[str, Any] | None
) -> tuple[RopeConfig, RopeConfig | None]:
    """Read the rope of full and of sliding layers; `local`: what is different about the latter.

    `rope_parameters` may have an object of each kind, as transformers 5 writes it; it states all but the base, which
    the family may have as a default.
    """
    each = reader.get("rope_parameters", None)
    if not isinstance(each, Mapping) or {FULL, SLIDING}.isdisjoint(each):
        rope = reader.rope(head_dim)
        return rope, None if local is None else reader.rope(head_dim, **local)
    unknown = sorted(set(each) - {FULL, SLIDING})
    if unknown:
        raise ConfigError(f"config.json: rope_parameters names {', '.join(unknown)}, beside {FULL} and {SLIDING}")
    bases = {FULL: reader.get("rope_theta", None)}
    bases[SLIDING] = (local or {}).get("rope_theta", bases[FULL])
    found = []
    for kind in (FULL, SLIDING):
        if not isinstance(each.get(kind) or {}, Mapping):
            raise ConfigError(f"config.json: rope_parameters.{kind} is {show(each[kind])}; it must be an object")
        base = {} if bases[kind] is None else {"rope_theta": bases[kind]}
        if each.get(kind):
            own = {**base, **each[kind]}
            found.append(reader.rope(head_dim, rope_scaling=None, rope_theta=None, rope_parameters=own))
    if not found:
        raise ConfigError(f"config.json: rope_parameters has nothing in {FULL} and {SLIDING}; state one of them")
    return found[0], found[-1]
