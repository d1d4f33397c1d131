"""Gemma 3 (`Gemma3ForCausalLM`, arXiv:2503.19786): five sliding layers per full layer, q and k norms.

Each kind of layer has its own rope; the norms replace Gemma 2's softcaps.

Of checkpoints that read images (`Gemma3ForConditionalGeneration`) only the text model is served.
"""

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import FULL, SLIDING, DecoderConfig
from jaxinfer.models.decoder_reader import text_part
from jaxinfer.models.gemma2 import gemma

THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
"""Default rope bases of full and of sliding layers."""
IMAGES = (
    "vision_config",
    "mm_tokens_per_image",
    "image_token_index",
    "boi_token_index",
    "eoi_token_index",
    "image_token_id",
    "boi_token_id",
    "eoi_token_id",
)
"""Attributes of config.json about images."""
NOT_TEXT = (r"(model\.)?(vision_tower|multi_modal_projector)\..*",)
"""Patterns of the vision tower's and projector's tensors."""


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; every `sliding_window_pattern`-th layer is full, and only these use `rope_scaling`.

    The `text_config` of a multimodal checkpoint may omit what equals the smallest model's value.
    """
    whole, reader = reader, text_part(reader, IMAGES)
    if reader is not whole:
        reader.defaults(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26)
    reader.defaults_if_absent(sliding_window=4096)
    reader.defaults(
        vocab_size=262_208,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=131_072,
        query_pre_attn_scalar=256,
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
    )
    each, layers = reader.get_int("sliding_window_pattern", 6), reader.get_int("num_hidden_layers")
    reader.skip("_sliding_window_pattern")  # a copy, beside layer_types
    reader.default_theta = THETA
    local = {"rope_theta": reader.get_float("rope_local_base_freq", LOCAL_THETA, above=1), "rope_scaling": None}
    kinds = [SLIDING if number % each else FULL for number in range(1, layers + 1)]
    return gemma(reader, kinds, qk_norm=True, local_rope=local)


FAMILY = Family(
    {"Gemma3ForCausalLM": "gemma3_text", "Gemma3ForConditionalGeneration": "gemma3"},
    config,
    Decoder,
    weight_rules,
    ignored=NOT_TEXT,
    float16=False,
)
