"""LoRA adapters of the sequences of a step, as part of its packed inputs: the slot of each token's adapter."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxinfer.engine.request import Sequence as Sample
from jaxinfer.layers.adapters import NONE


def shapes(bucket: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parts of a bucket's packed vector; none for a model without adapters."""
    return {"adapters": (bucket.tokens,)} if bucket.adapters else {}


def parts(bucket: Any, sequences: Iterable[Sample], tokens: Sequence[slice | int]) -> dict[str, np.ndarray]:
    """Build these parts for sequences and the places of their tokens in the step."""
    if not bucket.adapters:
        return {}
    slots = np.full(bucket.tokens, NONE, np.int32)
    for sequence, places in zip(sequences, tokens, strict=True):
        if sequence.request.adapter is not None:
            slots[places] = sequence.request.adapter.slot
    return {"adapters": slots}
