"""Tests' data of `models/lfm2.py`."""

from support import reference_changes as ref
from support.families import FULL, Case, FamilyData, Published
from support.parity_options import rope

CONV = "conv"
DATA = FamilyData(
    architecture="Lfm2ForCausalLM",
    config=dict(
        rms_norm_eps=None,
        norm_eps=1e-5,
        head_dim=None,
        hidden_size=64,
        block_multiple_of=16,
        block_ffn_dim_multiplier=1.5,
        conv_L_cache=4,
        layer_types=[CONV, FULL],
        tie_word_embeddings=False,
    ),
    published={
        "LFM2-1.2B": Published(
            "LiquidAI/LFM2-1.2B",
            "from memory of the published values; not compared with the file",
            dict(
                architectures=["Lfm2ForCausalLM"],
                block_auto_adjust_ff_dim=True,
                block_dim=2048,
                block_ff_dim=12288,
                block_ffn_dim_multiplier=1.0,
                block_mlp_init_scale=1.0,
                block_multiple_of=256,
                block_norm_eps=1e-05,
                block_out_init_scale=1.0,
                block_use_swiglu=True,
                block_use_xavier_init=True,
                bos_token_id=1,
                conv_L_cache=3,
                conv_bias=False,
                conv_dim=2048,
                conv_dim_out=2048,
                conv_use_xavier_init=True,
                eos_token_id=7,
                full_attn_idxs=[2, 5, 8, 10, 12, 14],
                hidden_size=2048,
                initializer_range=0.02,
                max_position_embeddings=128000,
                model_type="lfm2",
                norm_eps=1e-05,
                num_attention_heads=32,
                num_heads=32,
                num_hidden_layers=16,
                num_key_value_heads=8,
                pad_token_id=0,
                rope_theta=1000000.0,
                torch_dtype="bfloat16",
                transformers_version="4.54.0.dev0",
                use_cache=True,
                use_pos_enc=True,
                vocab_size=65536,
            ),
        ),
    },
    cases={
        "lfm2": Case(
            {},
            {
                "convolution": ref.with_weights("conv.conv.weight", 0.3),
                "norms of queries": ref.with_weights("q_layernorm.weight", 1.0),
                "norms of keys": ref.with_weights("k_layernorm.weight", 1.0),
                "norm before the mixer": ref.with_weights("operator_norm.weight", 1.0),
                "norm before the MLP": ref.with_weights("ffn_norm.weight", 1.0),
                "last norm": ref.with_weights("embedding_norm.weight", 1.0),
                "base of the rope": ref.with_config(**rope("default", rope_theta=100.0)),
            },
            lengths=(1, 3, 17, 40),
        ),
        "lfm2 biases": Case(
            {"conv_bias": True, "block_auto_adjust_ff_dim": False},
            {f"bias of {n}": ref.with_weights(f"{n}.bias", 0.0) for n in ("in_proj", "conv.conv", "out_proj")},
        ),
    },
)
