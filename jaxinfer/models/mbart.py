"""mBART and mBART-50 (`MBartForConditionalGeneration`, arXiv:2001.08210, arXiv:2008.00401): pre-norm BART."""

from functools import partial

from jaxinfer.models.bart import Bart, read_config, untie, weight_rules
from jaxinfer.models.base import Family

FAMILY = Family(
    {"MBartForConditionalGeneration": "mbart"}, partial(read_config, norm_first=True), Bart, weight_rules, untie=untie
)
