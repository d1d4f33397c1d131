"""Define a workload for all systems: prompts of random tokens, and the number of new tokens for each."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Work:
    """Requests in the order of their arrival."""

    prompts: list[list[int]]
    """Token ids of each prompt."""
    lengths: list[int]
    """New tokens per sample, for each prompt."""
    concurrency: int | None = None
    """Requests in flight: one arrives whenever another finishes. None: all arrive at once."""
    samples: int = 1
    """Samples per prompt."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""

    @property
    def prompt_tokens(self) -> int:
        """Total number of prompt tokens."""
        return sum(map(len, self.prompts))

    @property
    def new_tokens(self) -> int:
        """Total number of new tokens over all samples."""
        return sum(self.sample_lengths)

    @property
    def sample_lengths(self) -> list[int]:
        """New tokens of every sample, with the samples of a request in sequence."""
        return [length for length in self.lengths for _ in range(self.samples)]

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sequence."""
        return max(len(prompt) + new for prompt, new in zip(self.prompts, self.lengths, strict=True))

    @property
    def at_once(self) -> int:
        """Maximum number of requests in flight."""
        return min(self.concurrency or len(self.prompts), len(self.prompts))

    def describe(self) -> dict[str, int]:
        """Return the workload's sizes for the report."""
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


def random_work(
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
    """Return `count` requests with prompt lengths and new tokens drawn uniformly from two inclusive ranges.

    Raises:
        ValueError: a range is empty.
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
