"""Tests' data of `models/ministral.py`."""

from support import reference_changes as ref
from support.families import FULL, SLIDING, Case, FamilyData, Published
from support.parity_options import GROUPS, HEAD_DIM, NORMS, PLAIN, yarn

DATA = FamilyData(
    architecture="MinistralForCausalLM",
    variant=True,
    config=dict(sliding_window=9, layer_types=[FULL, SLIDING]),
    published={
        "Ministral-8B": Published(
            "mistralai/Ministral-8B-Instruct-2410",
            "from memory of the published values; not compared with the file. architectures, model_type and "
            "layer_types are written as transformers' class has them; the pattern is the model card's, from memory",
            config={
                "architectures": ["MinistralForCausalLM"],
                "attention_dropout": 0.0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "head_dim": 128,
                "hidden_act": "silu",
                "hidden_size": 4096,
                "initializer_range": 0.02,
                "intermediate_size": 12288,
                "layer_types": [FULL, SLIDING, SLIDING, SLIDING] * 9,
                "max_position_embeddings": 32768,
                "model_type": "ministral",
                "num_attention_heads": 32,
                "num_hidden_layers": 36,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-05,
                "rope_theta": 100000000.0,
                "sliding_window": 32768,
                "tie_word_embeddings": False,
                "torch_dtype": "bfloat16",
                "transformers_version": "4.46.0.dev0",
                "use_cache": True,
                "vocab_size": 131072,
            },
        ),
    },
    cases={
        "ministral": Case(
            {},
            {
                **GROUPS,
                **HEAD_DIM,
                **NORMS,
                "kinds of layers": ref.with_config(layer_types=[SLIDING, FULL]),
                "window": ref.with_config(layer_types=[FULL] * 2),
                "its last position": ref.with_config(sliding_window=8),
            },
            lengths=(8, 9, 10, 36),
        ),
        "ministral all sliding, yarn": Case(
            {"layer_types": None, **yarn()},
            {"window": ref.with_config(layer_types=[FULL] * 2), "yarn": PLAIN},
            lengths=(8, 9, 10, 36),
        ),
    },
)
