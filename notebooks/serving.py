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
# # A batch over time
#
# Continuous batching: sequences join and leave the batch between any two steps. A recording says what each of them did
# when: it waited, its prompt was computed (prefill), it made tokens (decode), or it was preempted for lack of blocks.

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
warm = llm.warmup(use_tqdm=False)  # no request waits for compilation

# %% [markdown]
# ## Twenty requests on eight rows
#
# Twenty questions, whose answers end when they end. Eight run at a time, the others wait for a row.

# %%
llm.start_recording()
prompts = [f"Question: {question}\nAnswer:" for question, _ in demo.sample_questions()]
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
outputs

# %%
axes = llm.plot_timeline()

# %% [markdown]
# The timeline is a value as well, and shows itself without matplotlib.

# %%
llm.timeline

# %% [markdown]
# ## Long prompts in chunks
#
# A step computes at most 64 tokens here. A prompt of more takes several steps, and the requests that decode go on in
# the same steps.

# %%
llm.reset_prefix_cache()
llm.start_recording()
long = " ".join(str(number) for number in range(50))
mixed = [*prompts[:2], long, *prompts[2:4]]
outputs = llm.generate(mixed, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
axes = llm.plot_timeline()
for step in llm.recording.steps[:5]:
    print(f"step {step.number}: prompt tokens {step.prefills}, decoding {step.decodes}")

# %% [markdown]
# ## Too few blocks
#
# When the cache is full the youngest sequence is preempted, waits, and is computed again from its tokens.

# %%
llm.reset_prefix_cache()
llm.start_recording()
params = SamplingParams(temperature=1.0, seed=5, max_tokens=56, ignore_eos=True)
outputs = llm.generate(prompts[:10], params, use_tqdm=False)
axes = llm.plot_timeline()

# %%
phases = ("waiting", "prefill", "decode", "preempted")
for row in llm.timeline.rows:
    spent = ", ".join(f"{phase} {1e3 * row.seconds(phase):.0f} ms" for phase in phases)
    print(f"request {row.owner.label:>3}: {spent}")

# %% [markdown]
# A server shows the same while it runs: `jaxinfer serve MODEL --debug-cache`, at `/debug/cache`.

# %%
llm.close()
