"""Tests' data of `models/granitemoehybrid.py`."""

from support import reference_changes as ref
from support.families import FULL, LINEAR_LAYER, Case, FamilyData, Published
from support.parity_options import rope

MAMBA = dict(mamba_n_heads=8, mamba_d_state=16, mamba_expand=2, mamba_n_groups=1)
"""Sizes of the tiny Mamba-2 layers."""
MAMBA_OPTIONS = {
    "decay": ref.with_weights("A_log", -6.0),
    "bias of the time steps": ref.with_weights("dt_bias", 0.0),
    "skip": ref.with_weights("mamba.D", 0.0),
    "convolution": ref.with_weights("conv1d.weight", 0.3),
    "bias of the convolution": ref.with_weights("conv1d.bias", 0.0),
    "gated norm": ref.with_weights("mamba.norm.weight", 1.0),
}
MULTIPLIERS = dict(embedding_multiplier=1.5, attention_multiplier=0.4, residual_multiplier=0.5, logits_scaling=0.8)
LAYERS = ["mamba"] * 5 + ["attention"] + ["mamba"] * 9
DATA = FamilyData(
    architecture="GraniteMoeHybridForCausalLM",
    config=MAMBA
    | MULTIPLIERS
    | dict(
        head_dim=None,
        intermediate_size=24,
        shared_intermediate_size=20,
        num_local_experts=6,
        num_experts_per_tok=2,
        layer_types=[LINEAR_LAYER, FULL],
    ),
    defaults={"mamba_n_heads": 8, "num_attention_heads": 8},
    published={
        "granite-4.0-h-tiny": Published(
            "ibm-granite/granite-4.0-h-tiny",
            "from memory of the published values; not compared with the file",
            dict(
                architectures=["GraniteMoeHybridForCausalLM"],
                attention_bias=False,
                attention_dropout=0.0,
                attention_multiplier=0.0078125,
                bos_token_id=100257,
                embedding_multiplier=12,
                eos_token_id=100257,
                hidden_act="silu",
                hidden_size=1536,
                init_method="mup",
                initializer_range=0.1,
                intermediate_size=512,
                layer_types=[*LAYERS[:6], *["mamba"] * 9, "attention", *["mamba"] * 9, "attention", *["mamba"] * 9]
                + ["attention", *["mamba"] * 4],
                logits_scaling=6,
                mamba_chunk_size=256,
                mamba_conv_bias=True,
                mamba_d_conv=4,
                mamba_d_head=64,
                mamba_d_state=128,
                mamba_expand=2,
                mamba_n_groups=1,
                mamba_n_heads=48,
                mamba_proj_bias=False,
                max_position_embeddings=131072,
                model_type="granitemoehybrid",
                normalization_function="rmsnorm",
                num_attention_heads=12,
                num_experts_per_tok=6,
                num_hidden_layers=40,
                num_key_value_heads=4,
                num_local_experts=64,
                output_router_logits=False,
                pad_token_id=100256,
                position_embedding_type="nope",
                residual_multiplier=0.22,
                rms_norm_eps=1e-05,
                rope_scaling=None,
                rope_theta=10000,
                router_aux_loss_coef=0.0001,
                shared_intermediate_size=1024,
                tie_word_embeddings=True,
                torch_dtype="bfloat16",
                transformers_version="4.56.0",
                use_cache=True,
                vocab_size=100352,
            ),
        ),
    },
    cases={
        "granitemoehybrid": Case(
            {},
            {
                **MAMBA_OPTIONS,
                **{name: ref.with_config(**{name: 1.0}) for name in MULTIPLIERS},
                "shared expert": ref.with_weights("shared_mlp.output_linear.weight", 0.0),
            },
        ),
        "granitemoehybrid dense": Case(
            {
                "num_local_experts": 0,
                "num_experts_per_tok": 0,
                "position_embedding_type": "rope",
                "mamba_proj_bias": True,
                "mamba_n_groups": 2,
                "mamba_conv_bias": False,
                "attention_bias": True,
            },
            {
                "rope": ref.with_config(**rope("default", rope_theta=100.0)),
                **{f"bias of {n}": ref.with_weights(f"{n}.bias", 0.0) for n in ("in_proj", "out_proj", "o_proj")},
            },
        ),
    },
)
