"""Pass the module outputs that a step has captured to the requests that asked for them."""

import numpy as np

from jaxinfer.engine.plan import Chunk, Plan
from jaxinfer.engine.request import Sequence
from jaxinfer.engine.runner.batch import spans
from jaxinfer.engine.runner.flight import Result
from jaxinfer.engine.sequence_state import Status
from jaxinfer.functional.taps import EXPERTS


def ends_here(chunk: Chunk) -> bool:
    """Return whether a chunk is the last of a request that ends with its prefill."""
    return chunk.sequence.request.wanted is not None and chunk.start + chunk.count == chunk.sequence.prefilled


def take_captured(plan: Plan, result: Result) -> None:
    """Pass the captured outputs of a step to its sequences."""
    found = {name: np.asarray(value) for name, value in result.sampled.captured.items()}
    experts = found.get(EXPERTS)
    if not result.first:
        if experts is not None:
            for sequence, place in zip(result.samples, result.places, strict=True):
                if sequence.status is not Status.FINISHED:
                    sequence.experts.append(experts[place : place + 1])
        return
    for span, chunk in zip(spans(plan), plan.chunks, strict=True):
        sequence, wanted = chunk.sequence, chunk.sequence.request.wanted
        if sequence.status is Status.FINISHED:
            continue
        if wanted is None and experts is not None:
            _take_experts(sequence, chunk.start, experts[span])
        elif wanted is not None and wanted.modules and chunk.start + chunk.count > wanted.first:
            wanted.captures.take(chunk.start, {name: found[name][span] for name in wanted.modules})
    if experts is not None:
        for number, sequence in plan.samples:  # forks continue from the prompt that they share
            if sequence is not plan.chunks[number].sequence:
                sequence.experts = list(plan.chunks[number].sequence.experts)


def _take_experts(sequence: Sequence, start: int, rows: np.ndarray) -> None:
    if start == 0:  # computed for the first time, or again
        sequence.experts = []
    sequence.experts.append(rows)
