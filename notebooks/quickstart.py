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
# # jaxinfer in five minutes
#
# Everything here runs on a CPU, with the small checkpoint that comes with the package: a Llama of a few million
# parameters that was trained on sums, comparisons and small facts.

# %%
from jaxinfer import LLM, SamplingParams, demo

llm = LLM(demo.path())

# %% [markdown]
# ## Generate
#
# Prompts go in, one result each comes out, in the same order. The first call compiles its steps; the bar says how fast
# it went.

# %%
questions = ["What is 17 plus 25?", "What is the capital of France?", "Which is larger, 38 or 83?"]
prompts = [f"Question: {question}\nAnswer:" for question in questions]
results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=48))
for question, result in zip(questions, results):
    print(f"{question:35}{result.outputs[0].text.strip()}")

# %% [markdown]
# A notebook shows a result as a table. Its metrics have the times of the request, and how much of the prompt was found
# in the prefix cache.

# %%
results[0]

# %%
print(results[0].metrics)

# %% [markdown]
# ## Stream
#
# `stream` yields what is new, as it is made. The deltas add up to the final text.

# %%
pieces = []
for update in llm.stream(prompts[1], SamplingParams(temperature=0, max_tokens=48)):
    pieces.append(update.outputs[0].text)
    print(update.outputs[0].text, end="|", flush=True)

# %%
assert "".join(pieces) == results[1].outputs[0].text

# %% [markdown]
# ## Chat
#
# `chat` puts messages through the checkpoint's template; without parameters the answer runs to its end.

# %%
chat = [{"role": "user", "content": "What is the opposite of hot?"}]
answer = llm.chat(chat, SamplingParams(temperature=0, max_tokens=None))[0]
print(answer.outputs[0].text, "-", answer.outputs[0].finish_reason)

# %%
chat += [
    {"role": "assistant", "content": answer.outputs[0].text},
    {"role": "user", "content": "What is 8 + 9?"},
]
answer = llm.chat(chat, SamplingParams(temperature=0, max_tokens=None))[0]
print(
    answer.outputs[0].text,
    "-",
    f"{answer.num_cached_tokens} of {len(answer.prompt_token_ids)} prompt tokens were cached",
)

# %% [markdown]
# ## Several samples
#
# The samples of a request share the blocks of its prompt; the last, half-filled one is copied when it is first written.
# One seed gives the same samples, whatever else is running.

# %%
sampled = llm.chat(chat[:1], SamplingParams(n=6, temperature=1.9, seed=7, max_tokens=32))[0]
for sample in sampled.outputs:
    print(sample.index, sample.text.strip())

# %% [markdown]
# ## Log-probabilities
#
# `logprobs=3` reports the three likeliest tokens beside the chosen one. Green tokens were certain, red ones were not;
# hover to see the candidates.

# %%
unsure = llm.chat(chat[:1], SamplingParams(temperature=1.9, seed=11, max_tokens=32, logprobs=3, prompt_logprobs=0))[0]
unsure

# %%
import matplotlib.pyplot as plt
import numpy as np

sample = unsure.outputs[0]
steps = [candidates[token] for token, candidates in zip(sample.token_ids, sample.logprobs)]
fig, axis = plt.subplots(figsize=(8, 2.6))
axis.bar(range(len(steps)), [np.exp(step.logprob) for step in steps], color="seagreen")
axis.set_xticks(range(len(steps)), [step.decoded_token for step in steps], rotation=60)
axis.set_ylabel("probability")
axis.set_title("how sure each token was")
fig.tight_layout()
plt.show()

# %% [markdown]
# ## What happened inside

# %%
for metric in llm.get_metrics():
    if isinstance(metric.value, (int, float)):
        print(f"{metric.name:40}{metric.value:>12.4g}")

# %%
llm.close()
