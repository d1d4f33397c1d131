"""Masks of the tokens that the sequences of a step may sample."""

from __future__ import annotations

from collections.abc import Sequence as Items
from functools import cache
from typing import Any

import numpy as np

from jaxinfer.engine.request import Sequence
from jaxinfer.engine.sampling.parameters import forbids_for_a_while, is_biased
from jaxinfer.engine.sampling.sampler import mask_width
from jaxinfer.engine.sequence_state import Status
from jaxinfer.engine.structured.grammar import allow_ends


@cache
def _executor() -> Any:
    from llguidance import LLExecutor

    return LLExecutor()


def fill_masks(samples: Items[Sequence], indices: np.ndarray, rows: int, vocab: int) -> np.ndarray:
    """Compute the masks of a step's next tokens, `[rows, W]` int32: bit v % 32 of word v // 32 allows token v.

    Sequences without structure, those that have ended, and padding may sample every token. The threads of llguidance
    compute masks of several sequences at once, without the GIL.

    Args:
        samples: sequences of the step; all their tokens are known.
        indices: index of each in the batch.
        rows: batch size of the step.
        vocab: number of columns of the logits, V'.
    """
    bound = [
        (sequence, index)
        for sequence, index in zip(samples, indices.tolist(), strict=True)
        if sequence.matcher is not None and sequence.status is not Status.FINISHED
    ]
    width = mask_width(vocab)
    masks = np.full((rows, bound[0][0].matcher.grammar.mask_words if bound else width), 0xFFFFFFFF, np.uint32)
    for sequence, _ in bound:
        sequence.matcher.advance(sequence.output_ids)
    _compute([(s, i) for s, i in bound if s.matcher.error is None], masks)
    for sequence, index in bound:
        if sequence.matcher.error is not None:
            masks[index] = 0xFFFFFFFF  # it ends in error when its next token is read, whatever that is
        elif sequence.matcher.grammar.end_ids != sequence.request.stop_ids:
            allow_ends(masks[index], sequence.matcher.grammar.end_ids, sequence.request.stop_ids)
    if masks.shape[1] != width:  # the tokenizer has more tokens than the model, or the model has padding
        masks = np.pad(masks[:, :width], ((0, 0), (0, max(0, width - masks.shape[1]))))
    return np.ascontiguousarray(masks).view(np.int32)


def _compute(bound: list[tuple[Sequence, int]], masks: np.ndarray) -> None:
    """Fill the rows of masks `[rows, W]` for (sequence, row) pairs."""
    while bound:
        states = [(sequence.matcher.state, index) for sequence, index in bound]
        _executor().unsafe_compute_mask_ptr(states, masks.ctypes.data, masks.shape[1] * 4, len(masks))
        bound = [(s, i) for s, i in bound if s.matcher.state.is_error() and s.matcher.recover(s.output_ids)]


def ends_without_token(sequence: Sequence) -> bool:
    """Return whether a sequence for which no token was left ends as complete.

    This is the case if its grammar allows the end, but the request's other masks forbid the stop token.
    """
    request = sequence.request
    if sequence.matcher is None or not sequence.matcher.accepting:
        return False
    repeats = request.params.no_repeat_ngram_size > 0
    return is_biased(request) or forbids_for_a_while(request) or repeats or not request.stop_ids
