"""Tests' data of `models/llama.py`."""

from support import reference_changes as ref
from support.families import Case, FamilyData, Published
from support.parity_options import (
    DYNAMIC,
    GROUPS,
    HEAD_DIM,
    LINEAR,
    LLAMA3,
    LONG,
    NORMS,
    PLAIN,
    SHORT,
    activation,
    longrope,
    rope,
    yarn,
)

DATA = FamilyData(
    architecture="LlamaForCausalLM",
    published={
        "Llama-2-7b": Published(
            "meta-llama/Llama-2-7b-hf", "from memory of the published values; not compared with the file"
        ),
        "Llama-3.1-8B": Published("meta-llama/Llama-3.1-8B", "NVIDIA aiconfigurator (GitHub), model_configs; verbatim"),
        "SmolLM2-135M": Published(
            "HuggingFaceTB/SmolLM2-135M", "from memory of the published values; not compared with the file"
        ),
        "TinyLlama-1.1B": Published(
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            "a copy that transformers 4.56 saved, in a public GitHub repository",
        ),
        "llama-7b": Published(
            "decapoda-research/llama-7b-hf", "from memory of the published values; not compared with the file"
        ),
    },
    cases={
        "llama": Case({}, {**GROUPS, **HEAD_DIM, **NORMS, "head": ref.with_config(tie_word_embeddings=True)}),
        "llama mqa, gelu": Case(
            {"num_key_value_heads": 1, "hidden_act": "gelu"},
            {
                "one kv head for all": ref.first_head_only,
                "gelu": activation("silu"),
                "exact gelu": activation("gelu_new"),
            },
            head=1.2,
        ),
        "llama mha, relu": Case(
            {"num_key_value_heads": 4, "head_dim": None, "hidden_act": "relu"}, {"relu": activation("silu")}
        ),
        "llama biases, gelu_pytorch_tanh": Case(
            {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
            {
                **{
                    f"bias of {name}": ref.with_weights(f"{name}_proj.bias", 0.0)
                    for name in ("q", "k", "v", "o", "gate", "up", "down")
                },
                "gelu_pytorch_tanh": activation("gelu"),
            },
            head=1.5,
        ),
        "llama tied, theta, epsilon, gelu_new": Case(
            {
                "tie_word_embeddings": True,
                "rms_norm_eps": 0.1,
                "hidden_act": "gelu_new",
                **rope("default", rope_theta=500.0),
            },
            {"rope_theta": PLAIN, "rms_norm_eps": ref.with_config(rms_norm_eps=1e-5), "gelu_new": activation("silu")},
        ),
        "llama linear": Case(LINEAR, {"linear": PLAIN}),
        "llama dynamic": Case(DYNAMIC, {"dynamic": PLAIN}),
        "llama llama3": Case(LLAMA3, {"llama3": PLAIN}),
        "llama yarn": Case(yarn(), {"yarn": PLAIN, "attention factor": ref.with_config(**yarn(attention_factor=1.0))}),
        "llama longrope": Case(
            longrope(32),
            {
                "short": ref.with_config(**longrope(32, short_factor=LONG)),
                "long": ref.with_config(**longrope(32, long_factor=SHORT)),
            },
        ),
    },
)
