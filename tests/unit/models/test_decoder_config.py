"""`DecoderConfig` refuses inconsistent fields."""

from dataclasses import replace
from typing import Any

import pytest
from support.tiny import CONFIG

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.layers.norms import Scaling
from jaxinfer.models import llama
from jaxinfer.models.decoder_config import LINEAR, SLIDING, DecoderConfig


def made() -> DecoderConfig:
    return llama.config(ConfigReader(CONFIG, "LlamaForCausalLM"))


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"kinds": (SLIDING,)}, "kinds has 1 entries for num_layers=2"),
        ({"kinds": (SLIDING, SLIDING)}, "window is None"),
        ({"kinds": (LINEAR, LINEAR)}, "linear is None"),
        ({"dense_layers": (0,)}, "moe is None"),
        ({"norms": ()}, "norms=()"),
        ({"norms": ("between",)}, "between"),
        ({"centred_norms": True, "norm_scaling": Scaling(offset=1.0)}, "norm_scaling"),
        ({"recomputed": True, "rope": None}, "rope is None"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], named: str):
    with pytest.raises(ValueError) as error:
        replace(made(), **fields)
    assert named in str(error.value)
