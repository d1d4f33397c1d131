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
# # One encoder input, many samples
#
# In a model with cross-attention the decoder's tokens attend to the positions of an encoder. Their keys and values are
# made once for each input, kept in blocks of the same cache, and shared: by the samples of a request, and by every
# request with an equal input. They are never written again, so they are never copied. The model here is a BART of two
# layers with random weights: its text is meaningless, and the example shows where its blocks lie.

# %%
import numpy as np

from jaxinfer import LLM, SamplingParams, sharding
from jaxinfer.loading import weights

bart = dict(
    architectures=["BartForConditionalGeneration"],
    vocab_size=512,
    d_model=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=128,
    decoder_ffn_dim=128,
    max_position_embeddings=256,
    decoder_start_token_id=2,
    eos_token_id=2,
    dtype="float32",
)
llm = LLM(
    weights.random(bart, sharding.make_mesh(1)),
    block_size=8,
    max_model_len=128,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    decode_buckets=(8,),
    prefill_buckets=(64,),
    decode_steps=1,
    kv_cache_memory_bytes=1 << 20,
)
llm

# %% [markdown]
# ## Six samples of one input
#
# The encoder reads 45 tokens, whose keys and values take six blocks. Six samples share them (6 in each cell) until the
# last one ends; each sample adds blocks of its own tokens only.

# %%
rng = np.random.default_rng(0)
document = rng.integers(4, 512, 45).tolist()


def read(ids):
    return {"encoder_prompt": {"prompt_token_ids": ids}, "decoder_prompt": {"prompt_token_ids": [2]}}


llm.start_recording()
params = SamplingParams(n=6, temperature=1.0, seed=1, max_tokens=20, ignore_eos=True)
summaries = llm.generate(read(document), params, use_tqdm=False)
axes = llm.plot_blocks()

# %% [markdown]
# ## The same input again
#
# Three more requests, two of them with the same input: the encoder runs once more only, for the new one. The blocks of
# the first are still there, cached, and become shared again.


# %%
def metric(name):
    return next(int(m.value) for m in llm.get_metrics() if m.name == f"jaxinfer:{name}")


before = metric("encoder_inputs")
other = rng.integers(4, 512, 30).tolist()
one = SamplingParams(temperature=1.0, seed=2, max_tokens=20, ignore_eos=True)
llm.generate([read(ids) for ids in (document, other, document)], one, use_tqdm=False)
print(f"inputs encoded: {before} before, {metric('encoder_inputs') - before} now")
axes = llm.plot_blocks()

# %% [markdown]
# The prefix tree has both encoder inputs, and the decoders' prefixes apart for each of them: the decoder's keys depend
# on what it reads.

# %%
llm.cache

# %%
llm.close()
