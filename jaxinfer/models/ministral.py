"""Ministral (`MinistralForCausalLM`): Mistral whose layers may differ, some with a sliding window and some without."""

from jaxinfer.models import mistral
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules

FAMILY = Family({"MinistralForCausalLM": "ministral"}, mistral.config, Decoder, weight_rules)
