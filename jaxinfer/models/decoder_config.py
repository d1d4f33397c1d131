"""Configuration of decoders of the Llama lineage, and the config.json attributes that its families share."""

from dataclasses import dataclass, replace
from typing import TypeAlias

from jaxinfer.layers.attention import AttentionSpec
from jaxinfer.layers.delta_net import DeltaNetSpec
from jaxinfer.layers.kda import KdaSpec
from jaxinfer.layers.mamba import MambaSpec
from jaxinfer.layers.mla import LatentSpec
from jaxinfer.layers.moe import MoEConfig
from jaxinfer.layers.norms import Scaling
from jaxinfer.layers.rope import RopeConfig
from jaxinfer.layers.short_conv import ShortConvSpec
from jaxinfer.media.inputs import Features
from jaxinfer.models.base import CrossSource

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
"""Kinds of layers, as named in `layer_types` of config.json."""

BEFORE, AFTER = "before", "after"
"""Position of an RMSNorm: on the input of attention or the MLP, or on the output before the residual is added."""

Linear: TypeAlias = KdaSpec | DeltaNetSpec | ShortConvSpec | MambaSpec
"""Token mixer with a recurrent state (KDA, gated DeltaNet, short convolution, Mamba-2)."""
Mixer: TypeAlias = AttentionSpec | LatentSpec | Linear
"""Token mixer of a layer (attention, MLA, or one with a recurrent state)."""


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
    local_attention: AttentionSpec | None = None
    """Attention of `SLIDING` layers, if it differs by more than its window (Gemma 4)."""
    lent_layers: int = 0
    """Number of last layers without keys and values: each attends to those of the last layer of its kind before them
    (Gemma 4)."""
    norms: tuple[str, ...] = (BEFORE,)
    """Norms around attention and the MLP: `BEFORE`, `AFTER`, or both (Gemma 2)."""
    norm_scaling: Scaling = Scaling()
    """Scaling of all norms of width M."""
    centred_norms: bool = False
    """Whether norms of width M subtract the mean first (a LayerNorm, Cohere); otherwise they are
    RMSNorms.
    """
    norm_bias: bool = False
    """Whether centred norms have a bias (Phi-MoE)."""
    head_bias: bool = False
    """Whether logits have a bias; only with a head of its own."""
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
    linear: Linear | None = None
    """Token mixer of `LINEAR` layers, which have a recurrent state."""
    recomputed: bool = False
    """Whether a sequence is recomputed when longrope's frequencies change (Phi-3)."""
    mlp_bias: bool = False
    mlp_gated: bool = True
    """Whether MLPs have a gate; False: `down(act(up(x)))` (Nemotron-H)."""
    bare_layers: tuple[int, ...] = ()
    """Layers of a token mixer alone, without an MLP (Nemotron-H)."""
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
        if self.norm_bias and not self.centred_norms:
            raise ValueError("norm_bias is set, but RMSNorms have no bias; set centred_norms")
        if self.head_bias and self.tied:
            raise ValueError("head_bias is set, but the head is the token embedding, which has no bias")
        if not {self.slides(i) for i in range(layers)} <= {self.slides(i) for i in range(layers - self.lent_layers)}:
            raise ValueError(f"lent_layers={self.lent_layers}, but no layer of a kind is left to lend; choose fewer")
        if self.recomputed and self.rope is None:
            raise ValueError("recomputed is for models whose rope changes with length, but rope is None")

    @property
    def query_group(self) -> int:
        """Number of query heads per kv head."""
        specs = [self.attention] if self.local_attention is None else [self.attention, self.local_attention]
        return min(one.heads if isinstance(one, LatentSpec) else one.heads // one.kv_heads for one in specs)

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
        spec = self.attention
        if self.slides(layer):
            spec = replace(spec if self.local_attention is None else self.local_attention, window=self.window)
        if not self.lent_layers:
            return spec
        lenders = {self.lender_of(number) for number in range(self.num_layers)}
        return replace(spec, lender=self.lender_of(layer), lends=layer in lenders)

    def lender_of(self, layer: int) -> int | None:
        """Return the layer whose keys and values a layer attends to; None for its own."""
        first = self.num_layers - self.lent_layers
        if layer < first:
            return None
        return max(number for number in range(first) if self.slides(number) == self.slides(layer))

    def ffn_of(self, layer: int) -> int:
        """Return the width of a layer's MLP."""
        return self.ffn

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
    """Mixin for configurations of models that contain a decoder: returns values of the decoder's configuration."""

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
