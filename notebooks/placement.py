# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Where does every weight lie?
#
# Some modules of a model are divided over devices, others are copied to each. `jaxinfer.sharding.plan` says which, what
# each device holds and what a step exchanges, from config.json alone: no weights are read, and the devices need not be
# there. Here is Llama-3.1-70B on eight devices of 80 GiB, planned on whatever machine runs this notebook. `plan` takes
# a folder or a Hub id as well.

# %%
from jaxinfer import sharding

llama_70b = dict(
    architectures=["LlamaForCausalLM"],
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    dtype="bfloat16",
)
plan = sharding.plan(llama_70b, tensor_parallel_size=8, memory=80 * 2**30)
plan

# %% [markdown]
# Layers that are alike are one line; open a module to see its parameters, their named axes and how many devices hold
# the same numbers. The same as values:

# %%
row = next(row for row in plan.rows if row.path == "layers.17.mlp.down.weight")
print(row.shape, row.logical_axes, row.spec, f"{row.device_bytes:,} bytes a device, {row.copies} copy")
print(plan.collectives("decode"), f"{plan.modules['layers.17']:,} bytes a device in layer 17")

# %% [markdown]
# ## Some layers tensor-parallel, some not
#
# `placement` names modules by patterns, and `LLM` takes the same. A replicated module exchanges nothing, takes its
# whole size on every device, and each device computes all of it.

# %%
placements = {
    "all sharded": {},
    "first layer replicated": {"layers.0": "replicate"},
    "attention replicated": {"*.attention": "replicate"},
    "MLPs replicated": {"*.mlp": "replicate"},
}
for name, placement in placements.items():
    made = sharding.plan(llama_70b, tensor_parallel_size=8, placement=placement, memory=80 * 2**30)
    print(
        f"{name:24}{made.device_bytes / 2**30:7.1f} GiB a device, {made.collectives('decode')}, room for "
        f"{made.tokens:,} tokens"
    )

# %% [markdown]
# ## A vision tower that does not divide
#
# InternVL3-38B has InternViT-6B with 25 attention heads, which eight devices cannot share. The plan says so, and what
# can be done.

# %%
internvl = dict(
    architectures=["InternVLForConditionalGeneration"],
    dtype="bfloat16",
    image_token_id=151667,
    image_seq_length=256,
    vision_config=dict(
        model_type="internvl_vision",
        hidden_size=3200,
        intermediate_size=12800,
        num_hidden_layers=45,
        num_attention_heads=25,
        image_size=[448, 448],
        patch_size=[14, 14],
        num_channels=3,
        norm_type="rms_norm",
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        use_qk_norm=True,
        attention_bias=False,
    ),
    text_config=dict(
        model_type="qwen2",
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=151674,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    ),
)
try:
    sharding.plan(internvl, tensor_parallel_size=8)
except ValueError as error:
    print(error)

# %% [markdown]
# The attention of the tower replicated and its MLPs sharded:

# %%
sharding.plan(internvl, tensor_parallel_size=8, placement={"vision_tower.*.attention": "replicate"}, memory=80 * 2**30)
