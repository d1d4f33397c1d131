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
# # Reinforcement learning with exact ratios
#
# The packaged checkpoint has learned to say which of *two* numbers is larger. Here it learns to find the largest of
# *three*, from nothing but whether its sampled answers are right: GRPO in `examples/grpo.py`, with jaxinfer sampling
# and optax updating all of its weights. It takes a minute on two cores.

# %%
import os
import random
import sys

import matplotlib.pyplot as plt
import numpy as np

from jaxinfer import LLM, SamplingParams, demo
from jaxinfer.functional import training

sys.path.insert(0, "../examples")
import grpo

settings = grpo.Settings(steps=int(os.environ.get("GRPO_STEPS", 20)))
asked = grpo.held_out(256)
llm = LLM(demo.path(), use_tqdm=False, **grpo.ENGINE)

# %% [markdown]
# ## Before
#
# Most of the wrong answers compare two of the numbers and forget the third.

# %%
greedy = SamplingParams(temperature=0, max_tokens=settings.max_tokens, stop=["\n"])


def show(count=6):
    """Print the answers to some of the held-out questions."""
    for question, output in zip(asked, llm.generate([q.prompt for q in asked[:count]], greedy, use_tqdm=False)):
        text = output.outputs[0].text.strip()
        mark = "right" if grpo.is_right(text, question.answer) else "wrong"
        print(f"{question.prompt.splitlines()[0]:55}{text:35}{mark}")


before = grpo.accuracy(llm, asked)
show()
print(f"{before:.1%} of {len(asked)} held-out questions are answered right")

# %% [markdown]
# ## The ratio of training to rollout
#
# The loss multiplies each advantage by the ratio of two probabilities of a token: by the weights that are trained, and
# by those that sampled it. Before the first update these are the same weights, so the ratio should be 1. It is, bit for
# bit, if the loss computes log-probabilities with the step of a deterministic engine (`serving=llm.step_shape`). With
# plain operations it is not: they round elsewhere.

# %%
batch, _ = grpo.sample(llm, grpo.draw(settings.questions, random.Random(0)), settings, seed=0)
module = llm.module()
training.prepare(module)
answered = np.asarray(batch.answered)
ratios = {
    name: np.exp(np.asarray(training.logprobs(module, batch.tokens, serving=shape)) - np.asarray(batch.old))[answered]
    for name, shape in {"plain operations": None, "serving=llm.step_shape": llm.step_shape}.items()
}
for name, found in ratios.items():
    print(f"{name:25}{np.mean(found == 1):8.1%} of {found.size} ratios are exactly 1, the others up to", end=" ")
    print(f"{np.abs(found - 1).max():.2g} away")

# %% [markdown]
# ## Train
#
# Each step samples 16 answers to each of 8 new questions, updates the weights once, and gives them to the running
# engine (`update_weights`), which goes on sampling with them.

# %%
reports = []
for report in grpo.train(llm, settings):
    reports.append(report)
    if report.step % 5 == 0:
        print(f"step {report.step:3}: {report.reward:.0%} of the samples are right")
assert all((report.ratios[0] == 1).all() for report in reports), "no step begins with any other ratio"
after = grpo.accuracy(llm, asked)

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4))
edges = np.linspace(0.9, 1.1, 41)
for name, found in ratios.items():
    left.hist(np.clip(found, 0.9, 1.1), edges, alpha=0.7, label=name, weights=np.full(found.size, 1 / found.size))
left.set(xlabel="ratio before the first update", ylabel="share of the tokens", title="training to rollout")
left.set_yscale("log")
left.legend(fontsize=8)
middle.plot([report.step for report in reports], [report.reward for report in reports], color="tab:green")
middle.set(xlabel="step", ylabel="share of right samples", ylim=(0, 1.02), title="reward")
bars = right.bar(["before", "after"], [before, after], color=["tab:gray", "tab:green"])
right.bar_label(bars, fmt="{:.1%}")
right.set(ylim=(0, 1.1), title=f"accuracy on {len(asked)} held-out questions")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## After

# %%
show()
print(f"{before:.1%} before, {after:.1%} after")
llm.close()
