"""Llama 4 (`Llama4ForCausalLM`): chunks of attention, layers without rope, experts whose inputs are weighed.

Of checkpoints that read images (`Llama4ForConditionalGeneration`) only the text model is served.
"""

from dataclasses import dataclass, fields, replace
from functools import partial

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.checkpoint.transposed_experts import TransposedExperts, transposed
from jaxinfer.errors import ConfigError
from jaxinfer.layers.attention import Growth
from jaxinfer.layers.moe import MoEConfig
from jaxinfer.layers.router import RouterConfig
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import FULL, SLIDING, Mixer
from jaxinfer.models.decoder_reader import layer_kinds, read_config, text_part
from jaxinfer.models.moe_rules import MoENames
from jaxinfer.models.smollm3 import SmolLM3Config, with_rope

CHUNKED = "chunked_attention"
"""Kind of layers that attend within a chunk, as named in `layer_types`; `SLIDING` in `DecoderConfig.kinds`."""
IMAGES = ("vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "image_token_id")
"""Attributes of config.json about images."""
NOT_TEXT = (r"(model\.)?(vision_model|multi_modal_projector)\..*",)
"""Patterns of the vision tower's and projector's tensors."""
NAMES = MoENames(("feed_forward",), router="router", shared="shared_expert")

SIZES = dict(
    vocab_size=202_048,
    hidden_size=5120,
    intermediate_size=8192,
    intermediate_size_mlp=16_384,
    num_hidden_layers=48,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    num_experts_per_tok=1,
    num_local_experts=16,
)
"""Defaults of transformers, which a file may omit."""


@dataclass(frozen=True)
class Llama4Config(SmolLM3Config):
    """Decoder of which some layers have no positional encoding, but queries that grow with their position."""

    growth: Growth | None = None
    """Growth of the queries of layers without rope."""

    def attention_of(self, layer: int) -> Mixer:
        """Return the token mixer of a layer."""
        spec = super().attention_of(layer)
        return replace(spec, query_growth=self.growth) if layer in self.nope_layers else spec


def config(reader: ConfigReader) -> Llama4Config:
    """Read the configuration of the text model, which may lie in `text_config` beside a vision tower's.

    `intermediate_size` is the width of one expert, `intermediate_size_mlp` that of the layers without experts.
    """
    reader = text_part(reader, IMAGES)
    # How a tool compresses a checkpoint, and training.
    reader.skip("for_llm_compressor", "router_jitter_noise")
    reader.default_theta = 500_000.0
    reader.defaults_if_absent(attention_chunk_size=8192)
    reader.defaults(**SIZES)
    layers, width = reader.get_int("num_hidden_layers"), reader.get_int("intermediate_size")
    if not reader.get("no_rope_layers", None):  # an empty list means the default
        reader.replace(no_rope_layers=None)
    turned, bias = with_rope(reader), reader.get_bool("attention_bias", False)
    chunk = reader.get_int("attention_chunk_size", None)
    usual = [CHUNKED if turned[layer] and chunk is not None else FULL for layer in range(layers)]
    kinds = layer_kinds(reader, usual, known=(FULL, CHUNKED))
    if chunk is None and CHUNKED in kinds:
        raise ConfigError(f"config.json: layer_types names {CHUNKED}, but attention_chunk_size is null; set it")
    experts, taken = reader.get_int("num_local_experts"), reader.get_int("num_experts_per_tok")
    router = RouterConfig("sigmoid", renormalise=False, by_logit=True)
    activation = reader.get_str("hidden_act", "silu")
    moe = MoEConfig(experts, taken, width, router, activation, shared=width, weigh_inputs=True)
    dense = _dense_layers(reader, layers)
    shared = read_config(
        reader,
        qkv_bias=bias,
        out_bias=bias,
        window=chunk,
        kinds=[SLIDING if kind == CHUNKED else FULL for kind in kinds],
        moe=None if len(dense) == layers else moe,
        dense_layers=() if len(dense) == layers else dense,
    )
    normed = reader.get_bool("use_qk_norm", True)
    own = dict(interleaved=True, chunked=True, rotated_norm=shared.norm_eps if normed else None)
    shared = replace(
        shared,
        ffn=reader.get_int("intermediate_size_mlp"),
        attention=replace(shared.attention, **own),
    )
    values = {field.name: getattr(shared, field.name) for field in fields(shared)}
    nope = tuple(layer for layer in range(layers) if not turned[layer])
    return Llama4Config(**values, nope_layers=nope, growth=_growth(reader))


def _dense_layers(reader: ConfigReader, layers: int) -> tuple[int, ...]:
    """Return the layers without experts: those that `moe_layers` does not name."""
    step = reader.get_int("interleave_moe_layer_step", 1, least=1)
    sparse = reader.get("moe_layers", None)
    sparse = list(range(step - 1, layers, step)) if sparse is None else sparse
    if not isinstance(sparse, list) or not all(type(layer) is int and 0 <= layer < layers for layer in sparse):
        raise ConfigError(
            f"config.json: moe_layers is {show(sparse)}; it must be a list of layers from 0 to {layers - 1}"
        )
    return tuple(layer for layer in range(layers) if layer not in sparse)


def _growth(reader: ConfigReader) -> Growth | None:
    """Read how queries grow; early files have a number for `attn_temperature_tuning`, of which 0 means no."""
    scale = reader.get_float("attn_scale", 0.1)
    length = reader.get_int("floor_scale", 8192, least=1)
    tuned = reader.get("attn_temperature_tuning", True)
    if not isinstance(tuned, (bool, int)):
        raise ConfigError(
            f"config.json: attn_temperature_tuning is {show(tuned)}; it must be true or false, or a whole number"
        )
    return Growth(scale, length, ahead=1, wide=True) if tuned else None


FAMILY = Family(
    {"Llama4ForCausalLM": "llama4_text", "Llama4ForConditionalGeneration": "llama4"},
    config,
    Decoder,
    partial(weight_rules, names=NAMES),
    source=partial(TransposedExperts, always=True),
    restore=transposed,
    ignored=NOT_TEXT,
)
