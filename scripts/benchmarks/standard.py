"""Define the five standard workloads that are tracked over time, W1 to W5, with their key figures."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxinfer.commands.bench import trace as traces
from jaxinfer.commands.bench.trace import Trace
from jaxinfer.commands.bench.work import Work, random_work


@dataclass(frozen=True)
class Figure:
    """Key figure computed from a pass."""

    name: str
    of: Callable[[Work, Trace], float]
    less_is_faster: bool = False


PREFILL = Figure("prefill_tokens_per_second", traces.prefill_rate)
DECODE = Figure("decode_tokens_per_second", traces.decode_rate)
GENERATED = Figure("output_tokens_per_second", lambda work, trace: work.new_tokens / trace.seconds)
FIRST = Figure("first_token_seconds", lambda work, trace: traces.first_tokens(trace), less_is_faster=True)


@dataclass(frozen=True)
class Standard:
    """Sizes of a standard workload: requests, prompt tokens (min, max), new tokens of each sample, samples per
    prompt.
    """

    what: str
    requests: int
    inputs: tuple[int, int]
    new: int
    figures: tuple[Figure, ...]
    samples: int = 1

    def work(self, *, vocab: int, seed: int, scale: float = 1.0) -> Work:
        """Return the requests; `scale` multiplies all lengths, for a quick run. Several samples require a
        temperature.
        """

        def scaled(size: int) -> int:
            return max(2, round(size * scale)) if size > 1 else size

        inputs = scaled(self.inputs[0]), scaled(self.inputs[1])
        return random_work(
            self.requests,
            inputs,
            (scaled(self.new),) * 2,
            vocab=vocab,
            seed=seed,
            samples=self.samples,
            temperature=0.0 if self.samples == 1 else 1.0,
        )


STANDARDS = {
    "W1": Standard("one sequence, 128 + 64 tokens", 1, (128, 128), 64, (PREFILL, DECODE)),
    "W2": Standard("eight equal sequences, 128 + 64 tokens", 8, (128, 128), 64, (DECODE,)),
    "W3": Standard("32 requests of 16 to 256 + 48 tokens, all at once", 32, (16, 256), 48, (GENERATED,)),
    "W4": Standard("time to the first token of a prompt of 2048", 1, (2048, 2048), 1, (FIRST,)),
    "W5": Standard("eight prompts of 512 tokens, 8 samples of 32 each", 8, (512, 512), 32, (GENERATED,), samples=8),
}
