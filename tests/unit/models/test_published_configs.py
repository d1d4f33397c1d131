"""Published config.json files: each is parsed and planned unchanged, and every architecture has one."""

from typing import Any

import pytest
from support import families

from jaxinfer import sharding
from jaxinfer.checkpoint.hf import apply_overrides
from jaxinfer.checkpoint.packed.declared import declared
from jaxinfer.loading import weights
from jaxinfer.models import registry
from jaxinfer.models.registry import architecture

PUBLISHED = families.published()
NAMES = sorted(PUBLISHED)


def published(name: str) -> dict[str, Any]:
    return apply_overrides(PUBLISHED[name])


def shallow(hf: dict[str, Any]) -> dict[str, Any]:
    """Reduce to two layers of each kind: plans all that differs between layers in a fraction of the time."""
    made = {
        name: shallow(value) if name.endswith("_config") and isinstance(value, dict) else value
        for name, value in hf.items()
    }
    made |= {
        name: 2
        for name in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_global_layers")
        if name in made
    }
    if isinstance(made.get("layer_types"), list):
        *others, last = made["layer_types"]
        made |= {"layer_types": [next((kind for kind in reversed(others) if kind != last), last), last]}
    if made.get("num_kv_shared_layers"):  # two that lend, and two that borrow
        made |= {"num_hidden_layers": 4, "layer_types": 2 * made["layer_types"], "num_kv_shared_layers": 2}
    if "full_attn_layers" in made:
        made |= {"full_attn_layers": [2], "kda_layers": [1]}
    made |= {name: [1] for name in ("full_attn_idxs", "attn_layer_indices") if made.get(name) is not None}
    made |= {"hybrid_override_pattern": "M-*-"} if "hybrid_override_pattern" in made else {}
    made |= {"full_attention_interval": 2} if "full_attention_interval" in made else {}
    made |= {"cross_attention_layers": [1]} if "cross_attention_layers" in made else {}
    if "intermediate_layers_indices" in made:
        made |= {"intermediate_layers_indices": [0], "vision_output_dim": 2 * made["hidden_size"]}
    return made


def test_every_architecture_has_a_published_file_and_every_file_its_entry():
    assert {path.stem for path in families.CONFIGS.glob("*.json")} <= set(NAMES)
    assert {architecture(published(name)) for name in NAMES} == set(registry.families())


@pytest.mark.parametrize("name", NAMES)
def test_published_configs_are_parsed_unchanged(name):
    model_family, config = weights.parse(published(name))
    assert config.max_length >= 448
    assert weights.resolve_dtype(
        "auto", weights.config_dtype(published(name)) or model_family.stored_dtype, "gpu", model_family
    )
    without = {key: value for key, value in published(name).items() if key != "architectures"}
    assert weights.parse(without)[1] == config


@pytest.mark.parametrize("name", NAMES)
def test_published_configs_are_planned(name):
    plan = sharding.plan(shallow(published(name)), tensor_parallel_size=1)
    assert plan.rows and plan.cache.layers


def test_the_blocks_of_deepseek_s_fp8_are_read():
    format = declared(PUBLISHED["DeepSeek-V3"])
    assert (format.method, format.block) == ("fp8", (128, 128))
