"""Tests' data of `models/phimoe.py`."""

from support import reference_changes as ref
from support.families import Case, FamilyData, Published
from support.parity_options import BIASES, GROUPS, LONG, PLAIN, longrope

HEADS = {"hidden_size": 64, "head_dim": None}
SCALED = {"short_mscale": 1.2, "long_mscale": 1.4}
SCALE = 1.243163121016122
DATA = FamilyData(
    architecture="PhimoeForCausalLM",
    config=HEADS | dict(num_local_experts=6, num_experts_per_tok=2, router_jitter_noise=0.2, lm_head_bias=True),
    published={
        "Phi-3.5-MoE": Published(
            "microsoft/Phi-3.5-MoE-instruct",
            "from memory of the published values, but the factors of longrope, which are 1; not compared with the file",
            dict(
                architectures=["PhiMoEForCausalLM"],
                attention_bias=True,
                attention_dropout=0.0,
                bos_token_id=1,
                eos_token_id=32000,
                hidden_act="silu",
                hidden_dropout=0.0,
                hidden_size=4096,
                initializer_range=0.02,
                input_jitter_noise=0.01,
                intermediate_size=6400,
                lm_head_bias=True,
                max_position_embeddings=131072,
                model_type="phimoe",
                num_attention_heads=32,
                num_experts_per_tok=2,
                num_hidden_layers=32,
                num_key_value_heads=8,
                num_local_experts=16,
                original_max_position_embeddings=4096,
                output_router_logits=False,
                rms_norm_eps=1e-05,
                rope_scaling=dict(
                    long_factor=[1.0] * 64,
                    long_mscale=SCALE,
                    original_max_position_embeddings=4096,
                    short_factor=[1.0] * 64,
                    short_mscale=SCALE,
                    type="longrope",
                ),
                rope_theta=10000.0,
                router_aux_loss_coef=0.0,
                router_jitter_noise=0.01,
                sliding_window=131072,
                tie_word_embeddings=False,
                torch_dtype="bfloat16",
                transformers_version="4.43.3",
                use_cache=True,
                vocab_size=32064,
            ),
        ),
    },
    cases={
        "phimoe": Case(
            {"attention_bias": True},
            {
                **GROUPS,
                **{name: change for name, change in BIASES.items() if name != "bias of k"},
                "distance of close experts": ref.with_config(router_jitter_noise=0.01),
                "bias of the head": ref.with_weights("lm_head.bias", 0.0),
                **{
                    f"{part} of {name}": ref.with_weights(f"{name}.{part}", value)
                    for name in ("input_layernorm", "post_attention_layernorm", "model.norm")
                    for part, value in (("weight", 1.0), ("bias", 0.0))
                },
            },
        ),
        "phimoe longrope": Case(
            longrope(128, **SCALED),
            {
                "longrope": PLAIN,
                "short factors": ref.with_config(**longrope(128, short_factor=LONG, **SCALED)),
                "scale of short sequences": ref.with_config(**longrope(128, short_mscale=1.0, long_mscale=1.4)),
            },
        ),
        # transformers' short factors for all lengths are those of long ones here (`models/phimoe.py`).
        "phimoe longrope long": Case(
            longrope(8, short_factor=LONG, long_factor=LONG, **SCALED),
            {
                "scale of long sequences": ref.with_config(
                    **longrope(8, short_factor=LONG, short_mscale=1.2, long_mscale=1.0)
                )
            },
            (9, 17, 38),
        ),
    },
)
