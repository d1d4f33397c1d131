"""What is asked of every system alike: prompts of random tokens, and how many new ones each shall bring."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Work:
    """Requests, in the order of their arrival."""

    prompts: list[list[int]]
    """Token ids."""
    lengths: list[int]
    """New tokens of each sample of each."""
    concurrency: int | None = None
    """Requests in flight: the next arrives when one of them has finished. None: all arrive at once."""
    samples: int = 1
    """Continuations of each prompt."""
    temperature: float = 0.0
    """0: greedy."""

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def new_tokens(self) -> int:
        """Of all samples of all requests."""
        return sum(self.sample_lengths)

    @property
    def sample_lengths(self) -> list[int]:
        """New tokens of every sample, those of a request one after another."""
        return [length for length in self.lengths for _ in range(self.samples)]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(prompt) + new for prompt, new in zip(self.prompts, self.lengths, strict=True))

    @property
    def at_once(self) -> int:
        """Requests in flight at most."""
        return min(self.concurrency or len(self.prompts), len(self.prompts))

    def describe(self) -> dict[str, int]:
        """Its sizes, for the report."""
        sizes = [len(prompt) for prompt in self.prompts]
        return {
            "requests": len(sizes),
            "prompt_tokens": self.prompt_tokens,
            "shortest_prompt": min(sizes),
            "longest_prompt": max(sizes),
            "samples": self.samples,
            "new_tokens": self.new_tokens,
            "concurrency": self.at_once,
        }


def spread(
    count: int,
    inputs: tuple[int, int],
    outputs: tuple[int, int],
    *,
    vocab: int,
    seed: int,
    concurrency: int | None = None,
    samples: int = 1,
    temperature: float = 0.0,
) -> Work:
    """`count` requests with prompt lengths and new tokens drawn evenly from the two ranges, ends included.

    Raises:
        ValueError: a range that ends before it begins.
    """
    for what, (least, most) in (("prompt", inputs), ("output", outputs)):
        if least > most:
            raise ValueError(f"the shortest {what} has {least} tokens, the longest {most}; swap or raise the latter")
    rng = np.random.default_rng(seed)
    sizes = rng.integers(inputs[0], inputs[1] + 1, count)
    new = rng.integers(outputs[0], outputs[1] + 1, count)
    # The first ids are special tokens in most vocabularies.
    prompts = [rng.integers(min(3, vocab - 1), vocab, size).tolist() for size in sizes]
    return Work(prompts, new.tolist(), concurrency, samples, temperature)
