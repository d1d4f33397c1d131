"""Host side of a joint step: a plan's prefill chunks and its decodes in one forward, which reads the weights once.

The tokens of the decodes take the last places of a prefill bucket, which would be padding otherwise; attention runs
them by its decode kernel. A joint step serves what most steps ask for; others are a prefill and a decode step.
"""

import numpy as np

from jaxinfer.engine.plan import Plan
from jaxinfer.engine.runner import adapted
from jaxinfer.engine.runner import batch as batches
from jaxinfer.engine.runner.batch import Bucket, spans
from jaxinfer.engine.sampling.sampling_rows import POSITION
from jaxinfer.kv.tables import Tables


def serves(plan: Plan) -> bool:
    """Return whether a plan has chunks and decodes, and a joint step can run them as far as the plan says."""
    if not plan.chunks or not plan.decodes or plan.drafts is not None or plan.steps > 1:
        return False
    steered = any(sequence.request.steering is not None for sequence in plan.sequences)
    prompts = any(batches.wants_prompt_logprobs(chunk) for chunk in plan.chunks)
    return not (steered or prompts or batches.wanted_modules(plan))


def joint_parts(plan: Plan, bucket: Bucket, tables: Tables, params: np.ndarray) -> dict[str, np.ndarray]:
    """Build the inputs of a joint step: those of a prefill, and decodes in the last places.

    Samples after chunks are first among the rows of logits, and decodes last.
    """
    parts, rows, now = batches.prefill_parts(plan, bucket, params), plan.rows, plan.positions
    count, places = len(rows), np.arange(bucket.decodes)
    here, own = (slice(size - count, size) for size in (bucket.tokens, bucket.decodes))
    parts["positions"][here], parts["rope_lengths"][here] = now, now + 1
    parts["rows"][here] = bucket.rows + places[own]
    parts["last"] = np.append(parts["last"], np.zeros(bucket.decodes, np.int32))[: bucket.decodes]
    parts["last"][own] = np.arange(here.start, here.stop)
    parts["sampling"][own] = params[rows]
    parts["sampling"][own, POSITION] = now + 1
    parts["decoding"] = np.full(bucket.decodes, len(params), np.int32)  # out of range: none
    parts["decoding"][own] = rows
    if not bucket.contiguous:
        parts["blocks"] = np.zeros((bucket.groups, bucket.decodes), np.int32)
        parts["blocks"][:, own] = tables.at(rows, now // tables.block_size)
    if bucket.cross:
        parts["seen"][here] = tables.seen[rows]
    if bucket.rope_axes:
        shifts = np.array([s.request.rope_shift for s in plan.decodes], np.int32)
        parts["rope_positions"][here] = (now + shifts)[:, None]
    sequences = [*(chunk.sequence for chunk in plan.chunks), *plan.decodes]
    return parts | adapted.parts(bucket, sequences, [*spans(plan), *range(here.start, here.stop)])
