"""Loads and stores of recurrent states, for Triton kernels. Imports triton, so only kernel modules may import it."""

import triton.language as tl

from jaxinfer.kernels.triton.jit import jit


@jit
def place(
    slot,
    head,
    part,
    FIRST: tl.constexpr,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Return offsets and mask of key rows [FIRST, FIRST + ROWS) and BLOCK_V columns of a head's state `[DK, DV]`."""
    row = FIRST + tl.arange(0, ROWS)
    column = part * BLOCK_V + tl.arange(0, BLOCK_V)
    at = ((slot.to(tl.int64) * H + head) * DK + row[:, None]) * DV + column[None, :]
    known = row * 0 + slot < N  # of the caller's shape, as Triton's interpreter takes no scalar mask
    return at, ((row < DK) & known)[:, None] & (column < DV)[None, :]


@jit
def load_state(
    states,
    slot,
    head,
    part,
    FIRST: tl.constexpr,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Load a part of a head's state, zeros for a slot that is out of range."""
    at, inside = place(slot, head, part, FIRST, H, DK, DV, N, ROWS, BLOCK_V)
    return tl.load(states + at, mask=inside, other=0.0)


@jit
def store_state(
    states,
    slot,
    state,
    head,
    part,
    FIRST: tl.constexpr,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Store a part of a head's state, unless the slot is out of range."""
    at, inside = place(slot, head, part, FIRST, H, DK, DV, N, ROWS, BLOCK_V)
    tl.store(states + at, state, mask=inside)
