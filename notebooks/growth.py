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
# # A cache that grows without being copied
#
# The simplest cache is an array that gets one more position at each step, by concatenation. Every step then copies all
# that was there before. A cache that is reserved once and donated to each step is written in place. This is what
# [PaddleNLP #9126](https://github.com/PaddlePaddle/PaddleNLP/pull/9126) does with virtual memory, and what donation
# does in JAX. `scripts/bench.py growth` compares them; here are its parts, on a small model with random weights.

# %%
import sys

sys.path.insert(0, "../scripts")

import matplotlib.pyplot as plt
from benchmarks import growth

llama = dict(
    architectures=["LlamaForCausalLM"],
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    dtype="float32",
)
work = growth.Work(rows=8, prompt=256, new=513, step=512, lengths=3, repeats=15)
found = growth.measure(llama, work)

# %% [markdown]
# All methods make the same tokens from the same keys and values. The time of a step against the positions that the rows
# have:

# %%
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
growth.draw(found, work, axes)

# %%
assert all(found[f"same_tokens@{name}"] == 1 for name in growth.METHODS)
for name in (growth.CONTIGUOUS, growth.PAGED):
    print(f"{name:12} {found[f'times_as_fast_as_concatenation@{name}']:5.2f} times as fast as concatenation")
print(f"reserving four times the room: {found['four_times_the_room_over_once']:.2f} of the step time")

# %% [markdown]
# ## Read off the compiled programs
#
# Each compiled program states how many bytes of its results lie where its arguments lay (aliased), and how many it
# allocates anew: a cache that stays in place is aliased.

# %%
print(f"{'MiB':14}{'aliased':>10}{'made anew':>12}{'temporary':>12}{'at the peak':>14}")
for name in growth.METHODS:
    kinds = ("aliased", "made_anew", "temporary", "peak")
    aliased, anew, temporary, peak = (found[f"{kind}_mib@{name}"] for kind in kinds)
    print(f"{name:14}{aliased:10.1f}{anew:12.1f}{temporary:12.1f}{peak:14.1f}")

# %% [markdown]
# ## The same in one's own code
#
# `functional.growing.GrowingCache` is the contiguous cache as a value. Each `append` consumes the cache it is called on
# and returns the next one, in the same memory. Using the old one is an error, as its memory is no longer its own.

# %%
from jaxinfer import functional, sharding
from jaxinfer.functional.growing import GrowingCache
from jaxinfer.loading import weights

mesh = sharding.make_mesh(1)
program, params = functional.split(weights.random(llama, mesh), mesh)
first = GrowingCache.reserve(program, rows=1, capacity=256, step=64)
logits, cache = first.append(params, [[1, 5, 9]])
for _ in range(20):
    logits, cache = cache.append(params, logits.argmax(axis=-1)[:, None])
print(cache.lengths)
try:
    first.append(params, [[1]])
except RuntimeError as error:
    print(f"{type(error).__name__}: {error}")
