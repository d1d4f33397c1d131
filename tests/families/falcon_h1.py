"""Tests' data of `models/falcon_h1.py`."""

from support import reference_changes as ref
from support.families import Case, FamilyData, Published
from support.parity_options import rope

from families.granitemoehybrid import MAMBA, MAMBA_OPTIONS

NUMBERS = dict(
    embedding_multiplier=1.5,
    lm_head_multiplier=1.3,
    key_multiplier=0.5,
    attention_in_multiplier=1.4,
    attention_out_multiplier=0.6,
    ssm_in_multiplier=0.7,
    ssm_out_multiplier=0.6,
)
MULTIPLIERS = NUMBERS | dict(mlp_multipliers=[0.6, 1.5], ssm_multipliers=[0.5, 0.8, 0.7, 0.6, 0.8])
DATA = FamilyData(
    architecture="FalconH1ForCausalLM",
    config=MAMBA | MULTIPLIERS | dict(head_dim=16, mamba_d_ssm=48),
    defaults={"mamba_n_heads": 8, "num_attention_heads": 8},
    published={
        "Falcon-H1-0.5B": Published(
            "tiiuae/Falcon-H1-0.5B-Instruct",
            "from memory of the published values; not compared with the file",
            dict(
                architectures=["FalconH1ForCausalLM"],
                attention_bias=False,
                attention_dropout=0.0,
                attention_in_multiplier=1.0,
                attention_out_multiplier=0.9375,
                attn_layer_indices=None,
                bos_token_id=1,
                embedding_multiplier=5.656854249492381,
                eos_token_id=11,
                head_dim=64,
                hidden_act="silu",
                hidden_size=1024,
                initializer_range=0.02,
                intermediate_size=2048,
                key_multiplier=0.39062499999999994,
                lm_head_multiplier=0.0390625,
                mamba_chunk_size=128,
                mamba_conv_bias=True,
                mamba_d_conv=4,
                mamba_d_head=64,
                mamba_d_ssm=1536,
                mamba_d_state=128,
                mamba_expand=2,
                mamba_n_groups=1,
                mamba_n_heads=24,
                mamba_norm_before_gate=False,
                mamba_proj_bias=False,
                mamba_rms_norm=False,
                mamba_use_mlp=True,
                max_position_embeddings=16384,
                mlp_bias=False,
                mlp_expansion_factor=8,
                mlp_multipliers=[0.8838834764831844, 0.5859375],
                model_type="falcon_h1",
                num_attention_heads=8,
                num_hidden_layers=36,
                num_key_value_heads=2,
                num_logits_to_keep=1,
                pad_token_id=0,
                projectors_bias=False,
                rms_norm_eps=1e-05,
                rope_scaling=None,
                rope_theta=100000000000.0,
                ssm_in_multiplier=1.25,
                ssm_multipliers=[0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
                ssm_out_multiplier=0.23570226039551587,
                tie_word_embeddings=False,
                torch_dtype="bfloat16",
                transformers_version="4.52.0.dev0",
                use_cache=True,
                vocab_size=32784,
            ),
        ),
    },
    cases={
        "falcon_h1": Case(
            {},
            {
                **{name: change for name, change in MAMBA_OPTIONS.items() if name != "gated norm"},
                **{name: ref.with_config(**{name: 1.0}) for name in NUMBERS},
                "multiplier of the gate": ref.with_config(mlp_multipliers=[1.0, 1.5]),
                "multiplier of the MLP's output": ref.with_config(mlp_multipliers=[0.6, 1.0]),
                **{
                    f"multiplier of {name}": ref.with_config(
                        ssm_multipliers=[1.0 if i == place else x for i, x in enumerate(MULTIPLIERS["ssm_multipliers"])]
                    )
                    for place, name in enumerate(("z", "x", "b", "c", "dt"))
                },
            },
        ),
        "falcon_h1 norm, biases": Case(
            {
                "mamba_rms_norm": True,
                "mamba_norm_before_gate": True,
                "mamba_n_groups": 2,
                "mamba_proj_bias": True,
                "projectors_bias": True,
                "attention_bias": True,
                "mlp_bias": True,
            },
            {
                "gated norm": ref.with_weights("mamba.norm.weight", 1.0),
                "norm before the gate": ref.with_config(mamba_norm_before_gate=False),
                "base of the rope": ref.with_config(**rope("default", rope_theta=100.0)),
                **{
                    f"bias of {n}": ref.with_weights(f"{n}.bias", 0.0)
                    for n in ("in_proj", "mamba.out_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
                },
            },
        ),
    },
)
