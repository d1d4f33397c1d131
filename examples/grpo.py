"""Teach a small model a kind of question that it gets wrong, with GRPO, jaxinfer and optax.

    pip install ".[train]"
    python examples/grpo.py

Each step draws samples of a few questions from the engine, rewards those whose answer is right, moves the weights
towards the samples that were better than the others of their question (GRPO, arXiv:2402.03300), and gives the new
weights to the running engine. The engine is deterministic, and the loss computes its log-probabilities with the
engine's own step: the ratio of the new policy to the one that sampled is exactly 1 before the first update of each
step, so that nothing the optimizer sees is numerical noise.
"""

import argparse
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxinfer import LLM, SamplingParams, demo
from jaxinfer.functional import training

ENGINE = {"deterministic": True, "max_model_len": 64, "max_num_seqs": 64}
"""Settings of the engine."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run."""

    steps: int = 20
    questions: int = 8
    """Questions of a step."""
    samples: int = 16
    """Samples of each question, which are compared with each other."""
    updates: int = 1
    """Updates of the weights by the samples of a step."""
    layers: int | None = None
    """Number of layers to train, from the last one back; None for all weights."""
    rate: float = 1e-4
    """Learning rate of Adam."""
    clip: float = 0.2
    """How far from 1 a ratio may move before its token has no gradient."""
    max_tokens: int = 16
    seed: int = 0


class Question(NamedTuple):
    """A prompt and its answer."""

    prompt: str
    answer: str


class Batch(NamedTuple):
    """Samples of one step: B sequences of L tokens, prompt and answer, padded at the end."""

    tokens: jax.Array
    """`[B, L]`."""
    answered: jax.Array
    """`[B, L - 1]`: which tokens after the first belong to an answer."""
    old: jax.Array
    """`[B, L - 1]`: the engine's log-probabilities of the tokens of answers; 0 elsewhere."""
    advantages: jax.Array
    """`[B]`."""


class Report(NamedTuple):
    """Results of a step."""

    step: int
    reward: float
    """Share of the samples that are right."""
    ratios: list[np.ndarray]
    """For each update, the ratio of the policy before it to the one that sampled, for each token of the answers."""


def draw(count: int, rng: random.Random) -> list[Question]:
    """Draw questions for the largest of three numbers. The packaged model has learned to compare two."""
    numbers = [rng.sample(range(10, 100), 3) for _ in range(count)]
    return [
        Question(f"Question: Which is the largest, {a}, {b} or {c}?\nAnswer:", str(max(a, b, c))) for a, b, c in numbers
    ]


def is_right(text: str, answer: str) -> bool:
    """Return whether the first number of a text is the answer."""
    return re.findall(r"\d+", text)[:1] == [answer]


def accuracy(llm: LLM, asked: Sequence[Question], max_tokens: int = Settings.max_tokens) -> float:
    """Return the share of questions that are answered right with greedy sampling."""
    greedy = SamplingParams(temperature=0, max_tokens=max_tokens, stop=["\n"])
    outputs = llm.generate([question.prompt for question in asked], greedy, use_tqdm=False)
    right = [is_right(output.outputs[0].text, question.answer) for output, question in zip(outputs, asked, strict=True)]
    return sum(right) / len(right)


def sample(llm: LLM, asked: Sequence[Question], settings: Settings, seed: int) -> tuple[Batch, float]:
    """Sample answers and compare those of each question; return them with their mean reward."""
    params = SamplingParams(n=settings.samples, max_tokens=settings.max_tokens, stop=["\n"], logprobs=0, seed=seed)
    outputs = llm.generate([question.prompt for question in asked], params, use_tqdm=False)
    pairs = [(output.prompt_token_ids, completion) for output in outputs for completion in output.outputs]
    # Lengths are rounded up, so that the update is compiled once or twice.
    length = -(-max(len(prompt) + settings.max_tokens for prompt, _ in pairs) // 16) * 16
    tokens = np.zeros((len(pairs), length), np.int32)
    old = np.zeros((len(pairs), length - 1), np.float32)
    answered = np.zeros((len(pairs), length - 1), bool)
    for row, (prompt, completion) in enumerate(pairs):
        start, made = len(prompt), len(completion.token_ids)
        tokens[row, : start + made] = [*prompt, *completion.token_ids]
        chosen = zip(completion.token_ids, completion.logprobs, strict=True)
        old[row, start - 1 : start - 1 + made] = [step[token].logprob for token, step in chosen]
        answered[row, start - 1 : start - 1 + made] = True
    rewards = np.array(
        [[is_right(one.text, own.answer) for one in output.outputs] for output, own in zip(outputs, asked, strict=True)]
    )
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)
    batch = Batch(jnp.array(tokens), jnp.array(answered), jnp.array(old), jnp.array(advantages.ravel(), jnp.float32))
    return batch, float(rewards.mean())


class Trainer:
    """The trained weights of an engine's model in float32, and their optimizer.

    Args:
        llm: the engine, with `deterministic=True`.
        settings: what the run does.
    """

    def __init__(self, llm: LLM, settings: Settings):
        self._llm, self._settings, self._shape = llm, settings, llm.step_shape
        module = llm.module()
        training.prepare(module)
        first = 0 if settings.layers is None else len(module.layers) - settings.layers

        def is_trained(path: Sequence[Any], _: Any) -> bool:
            return settings.layers is None or path[0] == "layers" and int(path[1]) >= first

        self._graph, trained, self._frozen = nnx.split(module, is_trained, ...)
        self._dtypes = jax.tree.map(lambda leaf: leaf.dtype, trained)
        # In float32: a step of the optimizer is smaller than what bfloat16 can add to a weight.
        self.weights = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), trained)
        self._optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(settings.rate))
        self._state = self._optimizer.init(self.weights)
        self._update = jax.jit(self._updated, donate_argnums=(0, 1))

    def update(self, batch: Batch) -> np.ndarray:
        """Update the weights; return the ratios of the tokens of answers before the update."""
        self.weights, self._state, ratios = self._update(self.weights, self._state, self._frozen, batch)
        return np.asarray(ratios)[np.asarray(batch.answered)]

    def publish(self) -> None:
        """Give the weights to the engine."""
        self._llm.update_weights(self._rounded(self.weights), partial=True)

    def module(self) -> nnx.Module:
        """Return the model with the weights as the engine gets them."""
        return nnx.merge(self._graph, self._rounded(self.weights), self._frozen)

    def _rounded(self, weights: Any) -> Any:
        """Return weights in the engine's dtype."""
        return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), weights, self._dtypes)

    def _updated(self, weights: Any, state: Any, frozen: Any, batch: Batch) -> tuple[Any, Any, jax.Array]:
        (_, ratios), slope = jax.value_and_grad(self._loss, has_aux=True)(weights, frozen, batch)
        changes, state = self._optimizer.update(slope, state)
        return optax.apply_updates(weights, changes), state, ratios

    def _loss(self, weights: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Return the clipped loss of GRPO, and the ratios `[B, L - 1]`."""
        module = nnx.merge(self._graph, self._rounded(weights), frozen)
        new = training.logprobs(module, batch.tokens, serving=self._shape)
        ratios = jnp.exp(jnp.where(batch.answered, new - batch.old, 0))
        clipped = jnp.clip(ratios, 1 - self._settings.clip, 1 + self._settings.clip)
        gains = jnp.minimum(ratios * batch.advantages[:, None], clipped * batch.advantages[:, None])
        return -jnp.sum(gains * batch.answered) / jnp.sum(batch.answered), ratios


def train(llm: LLM, settings: Settings) -> Iterator[Report]:
    """Train the model of an engine; yield a report of each step, after which the engine serves the new weights."""
    trainer, rng = Trainer(llm, settings), random.Random(settings.seed)
    for step in range(settings.steps):
        batch, reward = sample(llm, draw(settings.questions, rng), settings, rng.getrandbits(32))
        ratios = [trainer.update(batch) for _ in range(settings.updates)]
        trainer.publish()
        yield Report(step, reward, ratios)


def held_out(count: int) -> list[Question]:
    """Return questions for the accuracy; training draws them from other seeds, out of 704,880."""
    return draw(count, random.Random("held out"))


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(demo.path()), help="what LLM takes; by default the packaged checkpoint")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--rate", type=float, default=Settings.rate)
    parser.add_argument("--layers", type=int, help="train the last layers alone")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--held-out", type=int, default=256, help="questions for the accuracy")
    args = parser.parse_args()
    settings = Settings(steps=args.steps, rate=args.rate, layers=args.layers, seed=args.seed)
    asked = held_out(args.held_out)
    with LLM(args.model, **ENGINE) as llm:
        before = accuracy(llm, asked)
        for report in train(llm, settings):
            first = report.ratios[0]
            print(
                f"step {report.step:3}  reward {report.reward:.2f}  ratios {first.min()} to {first.max()}", flush=True
            )
        print(f"accuracy on held-out questions: {before:.3f} before, {accuracy(llm, asked):.3f} after")


if __name__ == "__main__":
    main()
