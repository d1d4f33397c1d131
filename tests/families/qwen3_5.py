"""Tests' data of `models/qwen3_5.py`."""

from support import reference_changes as ref
from support.families import FULL, LINEAR_LAYER, Case, FamilyData, Published
from support.parity_options import rope

LINEAR_ATTENTION = dict(
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_num_value_heads=4,
    linear_value_head_dim=12,
    layer_types=[LINEAR_LAYER, FULL],
)
MULTIMODAL = rope("default", partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True)
"""Rope of models that read images: for tokens of text it is a plain one."""
HYBRID = {
    "decay": ref.with_weights("A_log", -4.0),
    "bias of the decay": ref.with_weights("dt_bias", 0.0),
    "convolution": ref.with_weights("conv1d.weight", 0.3),
    "output gate of the recurrence": ref.with_weights("in_proj_z.weight", 0.0),
    "rotated columns": ref.with_config(**rope("default", partial_rotary_factor=1.0, mrope_section=[4, 2, 2])),
    "one more than the weight": ref.norms_as_kept,
}
"""References that overlook an option of both Qwen3.5 families."""
TEXT = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "eos_token_id": 248044,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "layer_types": [*[LINEAR_LAYER] * 3, FULL] * 16,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "use_cache": True,
    "vocab_size": 248320,
}
"""What the `text_config` of published Qwen3.5 models have in common."""
WHOLE = {
    "image_token_id": 248056,
    "tie_word_embeddings": False,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 248057,
    "vision_config": {"depth": 27, "hidden_size": 1152, "model_type": "qwen3_5"},
    "vision_end_token_id": 248054,
    "vision_start_token_id": 248053,
}
MEMORY = "from memory of the published values; not compared with the file; the vision tower's attributes are left out"

DATA = FamilyData(
    architecture="Qwen3_5ForCausalLM",
    config=LINEAR_ATTENTION,
    published={
        "Qwen3.5-27B": Published(
            "Qwen/Qwen3.5-27B",
            MEMORY,
            config={
                **WHOLE,
                "architectures": ["Qwen3_5ForConditionalGeneration"],
                "model_type": "qwen3_5",
                "text_config": {
                    **TEXT,
                    "hidden_size": 5120,
                    "intermediate_size": 17408,
                    "linear_num_value_heads": 48,
                    "model_type": "qwen3_5_text",
                    "num_attention_heads": 24,
                    "num_hidden_layers": 64,
                    "num_key_value_heads": 4,
                },
            },
        ),
        "Qwen3.5 text": Published(
            "none: what transformers writes of the text model",
            "the defaults of transformers' Qwen3_5TextConfig",
            config={
                **TEXT,
                "architectures": ["Qwen3_5ForCausalLM"],
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "layer_types": [*[LINEAR_LAYER] * 3, FULL] * 8,
                "linear_num_value_heads": 32,
                "model_type": "qwen3_5_text",
                "num_attention_heads": 16,
                "num_hidden_layers": 32,
                "num_key_value_heads": 4,
            },
        ),
    },
    cases={
        "qwen3_5": Case(MULTIMODAL, HYBRID, lengths=(1, 23, 24, 7), tolerance=5e-4),
    },
)
