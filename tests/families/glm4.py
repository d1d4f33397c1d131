"""Tests' data of `models/glm4.py`."""

from support import reference_changes as ref
from support.families import Case, FamilyData, Published
from support.parity_options import GROUPS, HEAD_DIM, NORMS, norms, rope

AFTER = ("post_self_attn_layernorm", "post_mlp_layernorm")

DATA = FamilyData(
    architecture="Glm4ForCausalLM",
    variant=True,
    config=dict(attention_bias=True),
    published={
        "GLM-4-9B-0414": Published(
            "zai-org/GLM-4-9B-0414",
            "from memory of the published values; not compared with the file",
            config={
                "architectures": ["Glm4ForCausalLM"],
                "attention_bias": False,
                "attention_dropout": 0.0,
                "eos_token_id": [151329, 151336, 151338],
                "head_dim": 128,
                "hidden_act": "silu",
                "hidden_size": 4096,
                "initializer_range": 0.02,
                "intermediate_size": 13696,
                "max_position_embeddings": 32768,
                "model_type": "glm4",
                "num_attention_heads": 32,
                "num_hidden_layers": 40,
                "num_key_value_heads": 2,
                "pad_token_id": 151329,
                "partial_rotary_factor": 0.5,
                "rms_norm_eps": 1e-05,
                "rope_theta": 10000.0,
                "tie_word_embeddings": False,
                "torch_dtype": "bfloat16",
                "transformers_version": "4.52.0.dev0",
                "use_cache": True,
                "vocab_size": 151552,
            },
        ),
    },
    cases={
        "glm4": Case(
            {},
            {
                **GROUPS,
                **HEAD_DIM,
                **NORMS,
                **norms(1.0, *AFTER),
                **{f"no {name}": ref.without(name) for name in AFTER},
                **{f"bias of {name}": ref.with_weights(f"{name}_proj.bias", 0.0) for name in "qkv"},
                "rotated columns": ref.with_config(**rope("default", partial_rotary_factor=1.0)),
            },
        ),
        "glm4 all columns, no biases, tied": Case(
            {"attention_bias": False, "tie_word_embeddings": True, **rope("default", partial_rotary_factor=1.0)},
            {"neighbouring columns": ref.with_attention(ref.rope_over_halves)},
        ),
    },
)
