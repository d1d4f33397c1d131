"""Phi-3, 3.5 and 4-mini (`Phi3ForCausalLM`): a checkpoint that is already fused (arXiv:2404.14219)."""

from dataclasses import replace
from functools import partial

from jaxinfer.checkpoint.hf import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig, read_config


def config(reader: ConfigReader) -> DecoderConfig:
    """Dropouts do nothing at inference; a window is that of all layers, as for Mistral.

    A sequence that outgrows longrope's original length is computed again, as transformers' `generate` does for
    this family: keys of both kinds beside each other would mean nothing.
    """
    for name in ("resid_pdrop", "embd_pdrop"):
        reader.skip(name)
    shared = read_config(reader, window=reader.get_int("sliding_window", None), partial_rotary=True)
    return replace(shared, recomputed=True)


FAMILY = Family(config, Decoder, partial(weight_rules, fused=True))
