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
# # Who owns which block?
#
# Keys and values lie in blocks of a few positions. A sequence has a table of them, samples of one prompt share them,
# and prompts find those of earlier ones. A recording of the engine's steps shows it happening. The cache here is small,
# with blocks of 8 tokens and one decode step at a time, so that the pictures fit.

# %%
from jaxinfer import LLM, SamplingParams, demo

llm = LLM(
    demo.path(),
    block_size=8,
    pool_blocks=48,
    max_model_len=256,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    decode_buckets=(8,),
    prefill_buckets=(64,),
    decode_steps=1,
    kv_cache_memory_bytes=1 << 20,
    use_tqdm=False,
)
llm

# %% [markdown]
# ## One prompt, four samples: fork, then copy on write
#
# The prompt is computed once. Then it forks: four samples share its blocks. Full blocks never change, so they stay
# shared. The last one is not full, and each sample writes its own next token there: three take a copy (the arrows), and
# the last holder keeps the block. `start_recording` switches the recording on; without one a step costs no more.

# %%
llm.start_recording()
four = SamplingParams(n=4, temperature=1.5, seed=7, max_tokens=24)
samples = llm.generate("Question: What is the opposite of hot, and of early?\nAnswer:", four, use_tqdm=False)
samples

# %%
axes = llm.plot_blocks()

# %% [markdown]
# The same as values: `blocks()` is an array of blocks by steps, and each step says what it did.

# %%
recording = llm.stop_recording()
for step in recording.steps:
    if step.forks or step.copies:
        print(f"step {step.number}: forks {step.forks}, copies of blocks {step.copies}")
print(recording.blocks()[:6, :8])
recording

# %% [markdown]
# ## Many prompts with one beginning
#
# Eight questions come after the same instruction. Its blocks are computed once and shared by all of them while they
# run. `llm.cache` is the state of the cache at one moment, here taken in the middle of a stream: requests, hits, and
# the prefix tree with the number of sequences that hold each part.

# %%
llm.reset_prefix_cache()
llm.start_recording()
questions = [question for question, _ in demo.sample_questions()[:8]]
prompts = [f"{demo.shared_prefix()}Question: {question}\nAnswer:" for question in questions]
stream = llm.stream(prompts, SamplingParams(temperature=0, max_tokens=24))
for number, _ in enumerate(stream):
    if number == 12:
        state = llm.cache
state

# %%
axes = llm.plot_blocks()

# %% [markdown]
# ## Why not more?
#
# Every miss has a reason. A prompt below one block has nothing to find, a new one is absent, another salt keeps it
# apart, and what was evicted for lack of room is remembered as such.

# %%
greedy = SamplingParams(temperature=0, max_tokens=8)


def ask(prompt, **more):
    made = llm.generate({"prompt": prompt, **more}, greedy, use_tqdm=False)[0].metrics
    return f"{made.cached_tokens:3} tokens found, then: {made.cache_miss_reason}"


long = f"{demo.shared_prefix()}Question: What is 31 plus 4?\nAnswer:"
print("too short:      ", ask("Hello"))
print("only the start: ", ask(long))
print("all of it:      ", ask(long))
print("another salt:   ", ask(long, cache_salt="somebody else"))
llm.generate([f"Number {n} is not like the others, says {n + 1}." * 2 for n in range(24)], greedy, use_tqdm=False)
print("after 24 others:", ask(long))

# %%
llm.cache

# %% [markdown]
# ## Too few blocks
#
# Eight long answers do not fit in 48 blocks. The youngest sequences are preempted: their blocks are released, and they
# are computed again when there is room, with the same tokens.

# %%
llm.reset_prefix_cache()
llm.start_recording()
long_answers = SamplingParams(temperature=1.0, seed=5, max_tokens=56, ignore_eos=True)
outputs = llm.generate([f"Question: What is {n} plus 9?\nAnswer:" for n in range(8)], long_answers, use_tqdm=False)
axes = llm.plot_blocks()
print(sum(output.metrics.num_preemptions for output in outputs), "preemptions")

# %% [markdown]
# `close` gives the memory back. The recording is a value and stays.

# %%
recording = llm.stop_recording()
llm.close()
print(llm)
print(recording)
