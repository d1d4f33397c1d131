"""Tests' data of `models/bamba.py`."""

from support import reference_changes as ref
from support.families import Case, FamilyData, Published
from support.parity_options import rope

from families.granitemoehybrid import MAMBA, MAMBA_OPTIONS

DATA = FamilyData(
    architecture="BambaForCausalLM",
    variant=True,
    config=MAMBA | dict(head_dim=None, attn_layer_indices=[1]),
    defaults={"mamba_n_heads": 8, "num_attention_heads": 8},
    published={
        "Bamba-9B-v2": Published(
            "ibm-ai-platform/Bamba-9B-v2",
            "from memory of the published values; not compared with the file",
            dict(
                architectures=["BambaForCausalLM"],
                attention_bias=False,
                attention_dropout=0.0,
                attn_layer_indices=[9, 18, 27],
                attn_rotary_emb=64,
                bos_token_id=128000,
                eos_token_id=128001,
                hidden_act="silu",
                hidden_size=4096,
                initializer_range=0.02,
                intermediate_size=14336,
                mamba_chunk_size=256,
                mamba_conv_bias=True,
                mamba_d_conv=4,
                mamba_d_head=64,
                mamba_d_state=128,
                mamba_expand=2,
                mamba_n_groups=1,
                mamba_n_heads=128,
                mamba_proj_bias=False,
                max_position_embeddings=262144,
                mlp_bias=False,
                model_type="bamba",
                num_attention_heads=32,
                num_hidden_layers=32,
                num_key_value_heads=8,
                num_logits_to_keep=1,
                pad_token_id=0,
                rms_norm_eps=1e-05,
                rope_scaling=None,
                rope_theta=10000.0,
                tie_word_embeddings=False,
                torch_dtype="bfloat16",
                use_cache=True,
                vocab_size=128256,
                z_loss_coefficient=0.0,
            ),
        ),
    },
    cases={
        "bamba": Case(
            {"mlp_bias": True, "attention_bias": True},
            {
                **MAMBA_OPTIONS,
                "norm before the MLP": ref.with_weights("pre_ff_layernorm.weight", 1.0),
                "last norm": ref.with_weights("final_layernorm.weight", 1.0),
                "base of the rope": ref.with_config(**rope("default", rope_theta=100.0, partial_rotary_factor=0.5)),
                "rotated columns": ref.with_config(**rope("default", partial_rotary_factor=1.0)),
                **{f"bias of {n}": ref.with_weights(f"{n}_proj.bias", 0.0) for n in ("q", "v", "o", "up", "down")},
            },
            cached=False,  # transformers counts the positions of a step after the prompt from 0
        ),
    },
)
