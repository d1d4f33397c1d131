"""Measure what hybrid models' sequences share (blocks of samples, prompt prefixes), and the cost (`bench.py sharing`).

Uses small random models with the layers of Gemma 3 (five sliding-window per full one), gpt-oss (sliding-window and full
in turn, sinks, experts), Kimi-Linear (three recurrent per MLA layer) and Qwen3.5 (three recurrent per full layer):

- samples: the most blocks held at a time while n samples of one prompt are drawn, relative to the fewest possible (for
  each layer, the blocks that the step's tokens read or write, each counted once) and to no sharing.
- prefixes: the requests of vLLM #45238, whose prompts share a prefix and then diverge, one after another and all at
  once. For every request but the first: how much of the common prefix was recomputed, and the time to the first token.
  With recurrent layers, the second request stores the state at the point of divergence, so requests count from the
  third on.
- speed: tokens per second of prompts without a common prefix, and of samples, with and without sharing, in turns.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

import numpy as np

from benchmarks.blocks import Counted
from jaxinfer import EngineConfig, SamplingParams
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.runner.warmup import warm_up
from jaxinfer.engine.sizing.settings import HostSettings
from jaxinfer.engine.sizing.setup import build_engine
from jaxinfer.inputs.defaults import ModelLimits, resolve
from jaxinfer.kv.cache import slot_bytes
from jaxinfer.kv.groups import blocks_needed
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh

VOCAB = 4096
COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 12,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "head_dim": 32,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "intermediate_size": 512,
        "sliding_window": 512,
        "query_pre_attn_scalar": 32,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "intermediate_size": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 128,
    },
    "kimi_linear": {
        "architectures": ["KimiLinearForCausalLM"],
        "intermediate_size": 512,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "model_max_length": 8192,
    },
    "qwen3_5": {
        "architectures": ["Qwen3_5ForCausalLM"],
        "intermediate_size": 512,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 32,
        "linear_num_value_heads": 8,
        "linear_value_head_dim": 32,
    },
}
"""Fields of each config.json beyond `COMMON`: the windows are those of Gemma 3 1B and gpt-oss."""
NEW = 4
"""New tokens per request of a prefix workload."""
SAMPLING = ("greedy", "random")
"""Sampler levels used by the requests, and by prefill chunks that do not end a prompt."""
Figures = dict[str, float]


@dataclass(frozen=True)
class Work:
    """Sizes of the three parts, in tokens unless noted."""

    samples: int
    """Number of samples, n."""
    prompt: int
    """Prompt tokens for the samples."""
    new: int
    """New tokens of each sample."""
    requests: int
    """Number of requests of a prefix workload."""
    prefixes: tuple[tuple[int, int], ...]
    """For each prefix workload: length of the common prefix, and of each request's own part."""
    pool: int
    """Capacity of the cache, in requests of a prefix workload without sharing."""
    throughput: tuple[int, int, int]
    """Number of requests without a common prefix, tokens of each prompt, and new tokens."""
    repeats: int
    """Passes with and without sharing."""


WORK = Work(16, 1024, 256, 64, ((1600, 600), (1500, 700)), 8, (32, 256, 64), 25)

SMALL = 8
"""Divisor of lengths and windows for a quick run."""


def config(name: str, *, small: bool = False) -> dict[str, Any]:
    """Return the config.json of a model; `small` scales the windows to match `smaller`."""
    values = dict(COMMON | MODELS[name])
    if "sliding_window" in values:
        values["sliding_window"] //= SMALL if small else 1
    if name == "kimi_linear":
        layers = range(1, values["num_hidden_layers"] + 1)
        full = [layer for layer in layers if layer % 4 == 0]
        values["num_key_value_heads"] = values["num_attention_heads"]
        values["linear_attn_config"] = {
            "num_heads": values["num_attention_heads"],
            "head_dim": values["head_dim"],
            "short_conv_kernel_size": 4,
            "full_attn_layers": full,
            "kda_layers": [layer for layer in layers if layer not in full],
        }
    return values


def smaller(work: Work) -> Work:
    """Return the sizes with an eighth of the lengths and a quarter of the requests."""
    count, prompt, new = work.throughput
    return replace(
        work,
        prompt=work.prompt // SMALL,
        new=work.new // SMALL,
        requests=max(2, work.requests // 4),
        prefixes=tuple((shared // SMALL, own // SMALL) for shared, own in work.prefixes),
        throughput=(max(2, count // 4), prompt // SMALL, new // SMALL),
    )


def measure(
    config: Mapping[str, Any], work: Work, settings: Mapping[str, Any], parts: Sequence[str], *, dtype: str, seed: int
) -> Figures:
    """Measure one model with the chosen methods of `Bench`."""
    mesh = make_mesh(1)
    module = weights.random(dict(config), mesh, dtype=dtype, seed=seed)
    lengths = *map(sum, work.prefixes), work.prompt + work.new, sum(work.throughput[1:])
    rows = max(work.samples, work.requests, work.throughput[0])
    own = {"max_model_len": max(lengths) + NEW, "max_num_seqs": rows} | dict(settings)
    engine = build_engine(module, EngineConfig.of(own), mesh)
    warm_up(engine.runner.prepare(SAMPLING), SAMPLING, use_tqdm=False)
    bench = Bench(engine, seed)
    figures: Figures = {}
    for part in parts:
        figures |= getattr(bench, part)(work)
    return figures


class Bench:
    """Compiled steps of one model, run by engines with and without sharing."""

    def __init__(self, engine: Engine, seed: int):
        self.runner: Runner = engine.runner
        self._settings: HostSettings = engine.settings
        self._seed, self._names = seed, 0
        program = self.runner.program
        self._limits = ModelLimits(program.vocab, self.runner.shapes.max_length)

    def samples(self, work: Work) -> Figures:
        """Measure the blocks held at a time by the samples of one prompt."""
        peaks = {}
        for share in (True, False):
            engine = self._engine(share=share, decode_steps=1)
            with Counted(engine) as counted:
                self._serve(engine, self._requests(1, work.prompt, 0, work.new, samples=work.samples))
            peaks[share] = counted.held
            if share:
                fewest = counted.fewest
        return {
            "peak_blocks": peaks[True],
            "fewest_blocks": fewest,
            "peak_over_fewest": peaks[True] / fewest,
            "peak_blocks_unshared": peaks[False],
            "unshared_over_shared": peaks[False] / peaks[True],
        }

    def prefixes(self, work: Work) -> Figures:
        """Measure prefix cache hits and times to first token, with a cache for a few requests."""
        figures: Figures = {}
        for shared, own in work.prefixes:
            pool = work.pool * self._blocks(shared + own + NEW)
            for name, at_once in (("one_by_one", 1), ("at_once", work.requests)):
                label, waits = f"@{shared}+{own}_{name}", {}
                for share in (True, False):
                    requests = self._requests(work.requests, shared, own, NEW)
                    engine = self._engine(share=share, pool_blocks=pool)
                    self._serve(engine, requests, at_once)
                    waits[share] = mean(r.first_token_time - r.arrival_time for r in requests)
                    if share:
                        figures |= {
                            name + label: value for name, value in self._found(engine, requests, shared).items()
                        }
                figures |= {
                    f"first_token_seconds{label}": waits[True],
                    f"first_token_seconds_unshared{label}": waits[False],
                    f"unshared_over_shared{label}": waits[False] / waits[True],
                }
        return figures

    def _found(self, engine: Engine, requests: Sequence[Request], shared: int) -> Figures:
        """Return the share of the common prefix that eligible requests found cached, and the cost of state
        snapshots.
        """
        states = engine.manager.states
        block, found = self.runner.shapes.block_size, [r.cached_tokens for r in requests[1 if states is None else 2 :]]
        figures = {
            "requests_that_could_hit": len(found),
            "requests_with_whole_prefix": sum(hit > shared - block for hit in found),
            "least_hit_tokens": min(found),
        }
        if states is not None:
            program, count = self.runner.program, int(states.published.sum())
            figures |= {
                "snapshots": count,
                "snapshot_mib": count * slot_bytes(program.layout.states, program.mesh) / 2**20,
            }
        return figures

    def speed(self, work: Work) -> Figures:
        """Measure tokens per second with and without sharing, in turns: medians, and the median of the ratios."""
        count, prompt, new = work.throughput
        figures = {}
        for name, samples in (("distinct", 1), ("samples", work.samples)):
            requests = max(1, count // samples)
            rates: dict[bool, list[float]] = {True: [], False: []}
            for number in range(work.repeats):
                for share in (True, False)[:: -1 if number % 2 else 1]:
                    asked = self._requests(requests, 0, prompt, new, samples=samples)
                    seconds = self._serve(self._engine(share=share), asked)
                    rates[share].append(requests * samples * new / seconds)
            figures |= {
                f"tokens_per_second@{name}": median(rates[True]),
                f"tokens_per_second_unshared@{name}": median(rates[False]),
                f"shared_over_unshared@{name}": median(a / b for a, b in zip(rates[True], rates[False], strict=True)),
            }
        return figures

    def _engine(self, *, share: bool, **settings: Any) -> Engine:
        """Return a new engine with an empty prefix cache."""
        self.runner.reset()
        return Engine(self.runner, replace(self._settings, prefix_caching=share, block_sharing=share, **settings))

    def _blocks(self, tokens: int) -> int:
        """Return the maximum number of blocks of a sequence."""
        shapes, kinds = self.runner.shapes, self.runner.program.layout.kinds
        return blocks_needed(kinds, tokens, shapes.block_size, self._settings.token_budget)

    def _requests(self, count: int, shared: int, own: int, new: int, *, samples: int = 1) -> list[Request]:
        """Return requests with new random prompts, whose first `shared` tokens are common."""
        self._names += 1
        rng = np.random.default_rng([self._seed, self._names])
        head = rng.integers(3, VOCAB, shared)
        params = SamplingParams(n=samples, max_tokens=new, seed=self._names, ignore_eos=True)
        params = resolve(params, self._limits, prompt_len=shared + own)
        return [
            Request(
                id=f"{self._names}.{number}",
                prompt=np.append(head, rng.integers(3, VOCAB, own)).astype(np.int32),
                params=params,
                limit=shared + own + new,
                seed=number,
            )
            for number in range(count)
        ]

    def _serve(self, engine: Engine, requests: Sequence[Request], at_once: int | None = None) -> float:
        """Serve the requests, at most `at_once` at a time; return the seconds until the last token.

        Raises:
            RuntimeError: a request failed.
        """
        waiting, running = list(requests)[::-1], []
        start = time.perf_counter()
        while waiting or engine.has_work:
            while waiting and len(running) < (at_once or len(requests)):
                running.append(waiting.pop())
                running[-1].arrival_time = time.monotonic()
                engine.add(running[-1])
            engine.step()
            running = [request for request in running if not request.finished]
        seconds = time.perf_counter() - start
        for request in requests:
            if request.error is not None:
                raise RuntimeError(f"request {request.id} failed: {request.error}")
        return seconds
