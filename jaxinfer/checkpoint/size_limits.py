"""Largest accepted sizes of config.json, checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.checkpoint.plain_json import show
from jaxinfer.errors import ConfigError

SIZE_CAPS = {
    "vocab_size": 2**22,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "moe_intermediate_size": 2**20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 2**14,
    "d_model": 2**17,
    "encoder_layers": 1024,
    "decoder_layers": 1024,
    "encoder_attention_heads": 4096,
    "decoder_attention_heads": 4096,
    "encoder_ffn_dim": 2**20,
    "decoder_ffn_dim": 2**20,
    "num_experts": 2**14,
    "num_local_experts": 2**14,
    "max_position_embeddings": 2**27,
    "n_routed_experts": 2**14,
    "n_shared_experts": 2**10,
    "num_shared_experts": 2**10,
    "num_experts_per_tok": 2**10,
    "num_experts_per_token": 2**10,
    "shared_expert_intermediate_size": 2**20,
    "num_global_layers": 1024,
    "attention_heads": 4096,
    "num_heads": 4096,
    "max_num_tiles": 256,
    "num_channels": 256,
    "num_mel_bins": 2**12,
    "max_source_positions": 2**20,
    "max_target_positions": 2**20,
    "vision_output_dim": 2**20,
    "kv_lora_rank": 2**17,
    "q_lora_rank": 2**17,
    "qk_nope_head_dim": 2**14,
    "qk_rope_head_dim": 2**14,
    "v_head_dim": 2**14,
    "linear_num_heads": 4096,
    "linear_num_key_heads": 4096,
    "linear_num_value_heads": 4096,
    "linear_head_dim": 2**14,
    "linear_key_head_dim": 2**14,
    "linear_value_head_dim": 2**14,
    "linear_conv_kernel_dim": 2**10,
    "short_conv_kernel_size": 2**10,
    "conv_L_cache": 2**10,
    "mamba_n_heads": 4096,
    "mamba_n_groups": 4096,
    "mamba_d_head": 2**14,
    "mamba_d_state": 2**14,
    "mamba_d_conv": 2**10,
    "mamba_d_ssm": 2**20,
    "mamba_expand": 2**10,
    "shared_intermediate_size": 2**20,
    "model_max_length": 2**27,
    "n_group": 2**14,
    "num_expert_group": 2**14,
    "topk_group": 2**14,
}
"""Largest accepted value of each size in config.json: far above any real model and far below an integer overflow."""


def check_sizes(config: Mapping[str, Any], *fields: str, part: str = "") -> None:
    """Check that each present field is a whole number from 1 to its cap in `SIZE_CAPS`, before anything is allocated.

    Absent fields pass: the model's family decides whether they have a default. Nested configurations (`vision_config`)
    are checked too.

    Args:
        config: contents of config.json, or of a nested configuration.
        fields: names in `SIZE_CAPS`.
        part: prefix of field names in error messages.

    Raises:
        ConfigError: a size is not a whole number or is outside of its range.
    """
    for name in fields:
        value, cap = int_if_whole(config.get(name)), SIZE_CAPS[name]
        if value is not None and (not is_int(value) or not 1 <= value <= cap):
            raise ConfigError(f"{part}{name}={show(value)} must be a whole number from 1 to {cap}.")
    for name, value in config.items() if not part else ():
        if name.endswith("_config") and isinstance(value, Mapping):
            check_sizes(value, *fields, part=f"{name}.")


def int_if_whole(value: Any) -> Any:
    """Convert a whole float (8192.0, as some tools write sizes) to an integer; return other values unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_int(value: Any) -> bool:
    """Return whether a value of a JSON file is an integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)
