"""Tests' data of `models/gpt_oss.py`."""

from support import reference_changes as ref
from support.families import FULL, SLIDING, Case, FamilyData, Published
from support.parity_options import BIASES, GROUPS, HEAD_DIM, PLAIN, norms, yarn

DATA = FamilyData(
    architecture="GptOssForCausalLM",
    config=dict(sliding_window=8, num_local_experts=6, num_experts_per_tok=2),
    published={
        "gpt-oss-20b": Published("openai/gpt-oss-20b", "NVIDIA aiconfigurator (GitHub), model_configs; verbatim"),
    },
    cases={
        "gpt_oss": Case(
            yarn(truncate=False),
            {
                **GROUPS,
                **HEAD_DIM,
                **BIASES,
                **norms(1.0, "input_layernorm", "post_attention_layernorm", "model.norm"),
                "sinks": ref.with_weights("sinks", -100.0),
                "yarn": PLAIN,
                "ends of the ramp": ref.with_config(**yarn()),
                "bias of the router": ref.with_weights("router.bias", 0.0),
                "router": ref.with_weights("router.weight", 0.0),
                **{f"bias of {name}": ref.with_weights(f"{name}_proj_bias", 0.0) for name in ("gate_up", "down")},
                "alpha": ref.with_config(swiglu_alpha=1.0),
                "experts of a token": ref.with_config(num_experts_per_tok=1),
                "kinds of layers": ref.with_config(layer_types=[FULL, SLIDING]),
                "window": ref.with_config(layer_types=[FULL] * 2),
            },
            lengths=(7, 8, 9, 40),
        ),
        "gpt_oss limit, window of a block, every expert": Case(
            {"swiglu_limit": 1.0, "sliding_window": 4, "num_experts_per_tok": 6, "tie_word_embeddings": True},
            {"limit": ref.with_config(swiglu_limit=7.0)},
            lengths=(3, 4, 5, 17),
        ),
    },
)
