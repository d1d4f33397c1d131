"""Run a random workload of every kind of request; count compilations after the warm-up and leaked resources."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer import LLM, SamplingParams

EVENT = "/jax/core/compile/backend_compile_duration"
KINDS: tuple[dict[str, Any], ...] = (
    dict(temperature=0),
    dict(temperature=0.8),
    dict(temperature=0.8, min_p=0.05),
    dict(temperature=0.8, top_k=20),
    dict(temperature=0.8, top_p=0.9),
    dict(temperature=0, repetition_penalty=1.2),
    dict(presence_penalty=0.5),
    dict(temperature=0, logit_bias={5: 2.0}),
    dict(allowed_token_ids=[4, 5, 6, 7]),
    dict(temperature=0, logprobs=3),
    dict(prompt_logprobs=2),
    dict(temperature=0.7, top_k=5, logprobs=0, prompt_logprobs=4),
    dict(min_tokens=3),
)
"""Sampling parameters of requests, covering every option."""
PREFIXES = 6
"""Number of common prompt prefixes."""
MOST_REQUESTS = 96
"""Maximum number of requests of one call."""


@contextmanager
def compilations() -> Iterator[list[float]]:
    """Record the seconds of each program that is compiled, or read from JAX's cache, in this context."""
    found: list[float] = []

    def listen(name: str, seconds: float, **_: object) -> None:
        if name == EVENT:
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def measure(folder: Path, vocab: int, settings: dict[str, Any], seconds: float, seed: int) -> dict[str, float]:
    """Warm up, then serve random calls of up to 96 requests for `seconds` seconds.

    Some calls are streams that are closed half-way, so that their requests are aborted.
    """
    rng, calls, aborted = np.random.default_rng(seed), 0, 0
    with LLM(folder, use_tqdm=False, **settings) as llm:
        done = llm.warmup()
        longest = llm._input_processor.limits.max_model_len
        with compilations() as compiled:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                prompts, params = _requests(rng, vocab, longest)
                calls += 1
                if rng.random() < 0.25:
                    aborted += _cut_short(llm, prompts, params, int(rng.integers(1, 60)))
                else:
                    llm.generate(prompts, params, use_tqdm=False)
        readings = {metric.name.removeprefix("jaxinfer:"): metric.value for metric in llm.get_metrics()}
    kept = ("generation_tokens", "prompt_tokens", "num_preemptions", "prefix_cache_hits", "padding_perc")
    return {name: float(readings[name]) for name in kept} | {
        "warmup_programs": float(done.programs),
        "warmup_seconds": done.seconds,
        "calls": float(calls),
        "calls_cut_short": float(aborted),
        "compiled_after_warmup": float(len(compiled)),
    }


def _requests(rng: np.random.Generator, vocab: int, longest: int) -> tuple[list[dict[str, Any]], list[SamplingParams]]:
    """Return prompts and sampling parameters of one call, with random lengths and counts."""
    count = int(np.exp(rng.uniform(0, np.log(MOST_REQUESTS))))
    prompts, params = [], []
    for _ in range(count):
        length = int(np.exp(rng.uniform(0, np.log(longest * 0.75))))
        prefix = np.random.default_rng(int(rng.integers(PREFIXES))).integers(3, vocab, length)
        prefix[length // 2 :] = rng.integers(3, vocab, length - length // 2)
        kind = KINDS[int(rng.integers(len(KINDS)))]
        samples = 1 if kind.get("temperature") == 0 else int(rng.choice([1, 1, 2, 5]))
        new = min(int(np.exp(rng.uniform(1.4, np.log(128)))), longest - length)
        prompts.append({"prompt_token_ids": prefix.tolist()})
        params.append(SamplingParams(**kind, n=samples, max_tokens=new, seed=int(rng.integers(1 << 30))))
    return prompts, params


def _cut_short(llm: LLM, prompts: list[dict[str, Any]], params: list[SamplingParams], updates: int) -> int:
    """Close a stream after some updates; return the number of requests left to abort."""
    stream = llm.stream(prompts, params)
    for _ in range(updates):
        if next(stream, None) is None:
            return 0
    stream.close()
    return 1
