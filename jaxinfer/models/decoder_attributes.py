"""Attributes of config.json that could request computations this decoder stack does not implement."""

from collections.abc import Mapping
from typing import Any

PLAIN: Mapping[str, tuple[Any, ...]] = {
    # Attention masks.
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "use_sliding_window": (False,),
    "use_logn_attn": (False,),
    # Positional encodings.
    "use_rope": (True,),
    "use_rotary": (True,),
    "rotary": (True,),
    "rope_interleaved": (False,),
    "rope_interleave": (False,),
    "use_mrope": (False,),
    "use_dynamic_ntk": (False,),
    "alibi": (False,),
    "use_alibi": (False,),
    "rotary_pct": (1,),
    "rotary_percent": (1,),
    "rope_pct": (1,),
    "rope_ratio": (1,),
    "position_embedding_type": ("rope", "rotary", "rotary_embedding"),
    # Biases.
    "attention_bias": (False,),
    "attn_bias": (False,),
    "qkv_bias": (False,),
    "use_qkv_bias": (False,),
    "add_qkv_bias": (False,),
    "mlp_bias": (False,),
    "use_mlp_bias": (False,),
    "lm_head_bias": (False,),
    "bias": (False,),
    "use_bias": (False,),
    "add_bias_linear": (False,),
    # Layer structure.
    "use_gated_activation": (True,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "parallel_residual": (False,),
    "attn_output_gate": (False,),
    "attention_output_gate": (False,),
    "norm_type": ("rmsnorm", "rms_norm", "RMSNorm"),
    "normalization_type": ("rmsnorm", "rms_norm", "RMSNorm"),
    # Multipliers.
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "use_mup": (False,),
    "mup": (False,),
}
"""Attributes found in published files of decoders, with the values that mean a decoder without the feature. Families
that implement a feature read its attribute themselves.
"""

_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_shared_experts",
    "num_shared_experts",
    "shared_expert_intermediate_size",
)


def one_values(*, qk_norm: bool, experts: bool) -> dict[str, tuple[Any, ...]]:
    """Return attributes of config.json with the values that this decoder stack implements.

    Args:
        qk_norm: whether queries and keys have norms.
        experts: whether layers have experts in place of an MLP.
    """
    norms = dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm"), (qk_norm,))
    counts = {} if experts else dict.fromkeys(_EXPERTS, (0,))
    return {**PLAIN, **norms, **counts, "use_moe": (experts,), "moe": (experts,)}
