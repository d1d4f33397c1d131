"""Qwen3-VL with experts (`Qwen3VLMoeForConditionalGeneration`), whose checkpoints store them transposed."""

from functools import partial

from jaxinfer.checkpoint.transposed_experts import TransposedExperts, transposed
from jaxinfer.models.base import Family
from jaxinfer.models.qwen3_vl.config import read_config
from jaxinfer.models.qwen3_vl.images import IMAGES
from jaxinfer.models.qwen3_vl.model import Qwen3VL, untie, weight_rules

FAMILY = Family(
    {"Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe"},
    partial(read_config, experts=True),
    Qwen3VL,
    weight_rules,
    images=IMAGES,
    source=TransposedExperts,
    restore=transposed,
    untie=untie,
)
