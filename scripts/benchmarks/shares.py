"""Compute the share of the machine's bandwidth that a decode step reaches, and of its matmul rate that a prefill
reaches.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from jaxinfer import LLM
from jaxinfer.checkpoint.rules import parameters
from jaxinfer.commands.bench.trace import Trace, first_tokens
from jaxinfer.commands.bench.work import Work


@dataclass(frozen=True)
class Costs:
    """Bytes read and operations computed by a step of a model."""

    weight_bytes: int
    """Weight bytes read by a step: all except an embedding that is only looked up."""
    weights: int
    """Number of matrix weights, each multiplied once per token."""
    head: int
    """Number of these in the head, multiplied once per sequence in a prefill."""
    kv_bytes: int
    """Bytes of keys and values of one position, over all layers."""
    attention: int
    """Multiplications and additions of one query with one position, over all layers."""
    dtype: str
    """Dtype of matrix products."""

    @classmethod
    def of(cls, llm: LLM) -> "Costs":
        """Compute the costs of a loaded model."""
        module, runner = llm._opened.module, llm._engine.runner
        config, found = module.config, parameters(module)
        read = {path: p for path, p in found.items() if config.tied or not path.startswith("embedding.")}
        # Codes of 4 bits lie two a byte.
        matrices = {path: p.size * (1 + (p.dtype == np.uint8)) for path, p in read.items() if path.endswith("weight")}
        positions = runner.shapes.num_blocks * runner.shapes.block_size
        quantised = any(p.dtype == np.int8 for p in read.values())
        return cls(
            weight_bytes=sum(p.size * p.dtype.itemsize for p in read.values()),
            weights=sum(matrices.values()),
            head=sum(size for path, size in matrices.items() if path.startswith(("head.", "embedding."))),
            kv_bytes=sum(array.nbytes for array in jax.tree.leaves(runner.cache)) // positions,
            attention=4 * config.attention.heads * config.attention.head_dim * config.num_layers,
            dtype="int8" if quantised else str(runner.program.dtype),
        )


def of(work: Work, trace: Trace, costs: Costs, rates: Mapping[str, float]) -> dict[str, float]:
    """Return the shares of one pass: of its decode steps if there are any, of its prefill if it has one prompt."""
    found = {}
    if max(work.lengths) > 1:
        found |= _decode(work, trace, costs, rates["read_gigabytes_per_second"])
    if len(work.prompts) == 1:
        found |= _prefill(len(work.prompts[0]), trace, costs, rates[f"{costs.dtype}_matmul_teraops_per_second"])
    return found


def _decode(work: Work, trace: Trace, costs: Costs, bandwidth: float) -> dict[str, float]:
    """Return the share of decode steps after every first token; weights are read once per step, live keys and values
    once per sequence.
    """
    start, end = first_tokens(trace), max(times[-1] for times in trace.times)
    steps = max(sum(at > start for at in times) for times in trace.times)
    prompts = [len(prompt) for prompt in work.prompts for _ in range(work.samples)]
    live = sum(
        prompt + made
        for prompt, times in zip(prompts, trace.times, strict=True)
        for made, at in enumerate(times)
        if at > start
    )
    gigabytes = (steps * costs.weight_bytes + live * costs.kv_bytes) / 1e9
    return {
        "decode_step_ms": 1e3 * (end - start) / steps,
        "decode_gigabytes_per_step": gigabytes / steps,
        "decode_share_of_read_bandwidth": gigabytes / (end - start) / bandwidth,
    }


def _prefill(prompt: int, trace: Trace, costs: Costs, rate: float) -> dict[str, float]:
    """Return the share over the time to the first token; every weight is multiplied once per token, the head once,
    attention is causal.
    """
    pairs = prompt * (prompt + 1) // 2
    operations = 2 * (costs.weights - costs.head) * prompt + 2 * costs.head + costs.attention * pairs
    seconds = first_tokens(trace)
    return {
        "prefill_ms": 1e3 * seconds,
        "prefill_teraops": operations / 1e12,
        "prefill_share_of_matmul_rate": operations / 1e12 / seconds / rate,
    }
