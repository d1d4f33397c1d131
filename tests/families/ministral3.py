"""Tests' data of `models/ministral3.py`."""

from support import reference_changes as ref
from support.families import Case, FamilyData, Published
from support.parity_options import GROUPS, HEAD_DIM, NORMS, rope


def growing(**changes: float) -> dict[str, dict[str, object]]:
    """Return a rope whose original length is 12 tokens, so that queries grow within the tests' prompts."""
    return rope(
        "yarn", **{"factor": 8.0, "original_max_position_embeddings": 12, "llama_4_scaling_beta": 0.5, **changes}
    )


MEMORY = "from memory of the published values; not compared with the file; the vision tower's attributes are left out"
TEXT = {
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 262144,
    "model_type": "ministral3",
    "num_attention_heads": 32,
    "num_hidden_layers": 34,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
        "type": "yarn",
    },
    "sliding_window": None,
    "use_cache": True,
    "vocab_size": 131072,
}
WHOLE = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "dtype": "bfloat16",
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "vision_config": {"hidden_size": 1024, "model_type": "pixtral"},
    "vision_feature_layer": -1,
}

DATA = FamilyData(
    architecture="Ministral3ForCausalLM",
    variant=True,
    published={
        "Ministral-3-8B": Published(
            "mistralai/Ministral-3-8B-Base-2512",
            MEMORY,
            config={**WHOLE, "tie_word_embeddings": False, "text_config": TEXT},
        ),
        "Mistral-Small-3.2": Published(
            "mistralai/Mistral-Small-3.2-24B-Instruct-2506",
            MEMORY,
            config={
                **WHOLE,
                "tie_word_embeddings": False,
                "text_config": {
                    "attention_dropout": 0.0,
                    "head_dim": 128,
                    "hidden_act": "silu",
                    "hidden_size": 5120,
                    "initializer_range": 0.02,
                    "intermediate_size": 32768,
                    "max_position_embeddings": 131072,
                    "model_type": "mistral",
                    "num_attention_heads": 32,
                    "num_hidden_layers": 40,
                    "num_key_value_heads": 8,
                    "rms_norm_eps": 1e-05,
                    "rope_theta": 1000000000.0,
                    "sliding_window": None,
                    "use_cache": True,
                    "vocab_size": 131072,
                },
            },
        ),
        "Ministral-3 text": Published(
            "none: what transformers writes of the text model",
            "the defaults of transformers' Ministral3Config",
            config={**TEXT, "architectures": ["Ministral3ForCausalLM"]},
        ),
    },
    cases={
        "ministral3": Case(
            growing(),
            {
                **GROUPS,
                **HEAD_DIM,
                **NORMS,
                "growth of queries": ref.with_config(**growing(llama_4_scaling_beta=0.0)),
                "its length": ref.with_config(**growing(original_max_position_embeddings=13)),
            },
            lengths=(11, 12, 13, 28),
        ),
    },
)
