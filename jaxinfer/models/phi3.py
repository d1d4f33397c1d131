"""Phi-3, 3.5 and 4-mini (`Phi3ForCausalLM`): Llama with fused checkpoint tensors (arXiv:2404.14219)."""

from dataclasses import replace
from functools import partial

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig
from jaxinfer.models.decoder_reader import read_config, window_of


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; a window applies to all layers, as in Mistral.

    A sequence that outgrows longrope's original length is recomputed, as in transformers' `generate` for this family:
    keys computed with different frequencies cannot be mixed.
    """
    reader.defaults(max_position_embeddings=4096, original_max_position_embeddings=4096, rms_norm_eps=1e-5)
    reader.skip("full_attn_mod", "interpolate_factor")  # used by the remote code of Phi-4-mini
    shared = read_config(reader, window=window_of(reader), partial_rotary=True)
    return replace(shared, recomputed=True)


FAMILY = Family({"Phi3ForCausalLM": "phi3"}, config, Decoder, partial(weight_rules, fused=True))
