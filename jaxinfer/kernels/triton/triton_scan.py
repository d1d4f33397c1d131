"""Triton kernels of Mamba-2's recurrence (`kernels.state.ssd`). Imports triton, so it is imported only when launched.

`scan` takes one sequence through its tokens in chunks, with a part of a head's state in registers: what of a chunk does
not depend on the state is little and is computed there too, so nothing is kept in memory between. `scan_steps` is the
plain recurrence: decode, and steps whose bits must not depend on where chunks begin.

Rows of all arrays are float32 and contiguous. Parameters annotated `tl.constexpr` are compile-time constants; all
others are pointers. `triton_ssd` makes their arguments.
"""

import triton.language as tl

from jaxinfer.kernels.triton.jit import jit
from jaxinfer.kernels.triton.triton_states import load_state, store_state


@jit
def _part(
    q,
    k,
    at,
    live,
    state,
    added,
    total,
    found,
    scores,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    DK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take key rows [FIRST, FIRST + ROWS) of a state through a chunk.

    Args:
        q: `[T, G, DK]`, k likewise.
        at: offsets of the chunk's tokens in both, `[SIZE]`.
        live: which of them belong to the segment, `[SIZE]`.
        state: `[ROWS, BLOCK_V]`.
        added: values decayed to the chunk's end, `[SIZE, BLOCK_V]`.
        total: decay over the chunk.
        found: sum of queries times the state so far, `[SIZE, BLOCK_V]`.
        scores: sum of queries times keys so far, `[SIZE, SIZE]`.
    """
    column = FIRST + tl.arange(0, ROWS)
    place = at[:, None] + column[None, :]
    inside = live[:, None] & (column < DK)[None, :]
    query = tl.load(q + place, mask=inside, other=0.0)
    key = tl.load(k + place, mask=inside, other=0.0)
    found = tl.dot(query, state, found, input_precision=PRECISION)
    scores = tl.dot(query, tl.trans(key), scores, input_precision=PRECISION)
    state = tl.dot(tl.trans(key), added, state * total, input_precision=PRECISION)
    return state, found, scores


@jit
def scan(
    segments,
    q,
    k,
    v,
    g,
    states,
    out,
    new_states,
    H: tl.constexpr,
    G: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    N: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Process a sequence's tokens in chunks: program (x, y) is BLOCK_V columns of a head's values, and segment y.

    Sums of log-decays add up their own terms, as differences of sums from the start would cancel.

    Args:
        segments: `[R, 6]` int32, as in `triton_recurrence.advance`; the first chunk is not read.
        q: `[T, G, DK]`, k likewise, v `[T, H, DV]`, g `[T, H, 1]`.
        states: `[N, H, DK, DV]`, the same memory as new_states.
        out: `[T, H, DV]`; tokens of no segment are not written.
    """
    parts: tl.constexpr = V_COLUMNS // BLOCK_V
    head, part, run = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.program_id(1)
    count = tl.load(segments + run * 6 + 5)
    if count == 0:
        return
    source = tl.load(segments + run * 6 + 2)
    group = head // (H // G)
    # Parts of the keys: fragments of products over all of them at once would not fit in registers.
    PARTS: tl.constexpr = 4 if K_COLUMNS > 128 else 2
    ROWS: tl.constexpr = K_COLUMNS // PARTS
    state0 = load_state(states, source, head, part, 0, H, DK, DV, N, ROWS, BLOCK_V)
    state1 = load_state(states, source, head, part, ROWS, H, DK, DV, N, ROWS, BLOCK_V)
    if PARTS > 2:
        state2 = load_state(states, source, head, part, 2 * ROWS, H, DK, DV, N, ROWS, BLOCK_V)
        state3 = load_state(states, source, head, part, 3 * ROWS, H, DK, DV, N, ROWS, BLOCK_V)
    token = tl.arange(0, SIZE)
    v_column = part * BLOCK_V + tl.arange(0, BLOCK_V)
    later = token[:, None] > token[None, :]
    for segment in range(run, run + count):
        start, tokens = tl.load(segments + segment * 6), tl.load(segments + segment * 6 + 1)
        for begin in range(0, tokens, SIZE):
            live = begin + token < tokens
            at = (start + begin + token).to(tl.int64)
            k_at = (at * G + group) * DK
            v_at = (at * H + head)[:, None] * DV + v_column[None, :]
            inside = live[:, None] & (v_column < DV)[None, :]
            value = tl.load(v + v_at, mask=inside, other=0.0)
            fade = tl.load(g + at * H + head, mask=live, other=0.0)
            sums = tl.cumsum(tl.where(later, fade[:, None], 0.0), axis=0)
            to_end = tl.exp(tl.sum(tl.where(later, fade[:, None], 0.0), 0))[:, None]
            from_start = tl.exp(tl.cumsum(fade, axis=0))[:, None]
            total = tl.exp(tl.sum(fade, 0))

            added = value * to_end
            found = tl.zeros([SIZE, BLOCK_V], tl.float32)
            scores = tl.zeros([SIZE, SIZE], tl.float32)
            state0, found, scores = _part(q, k, k_at, live, state0, added, total, found, scores, 0, ROWS, DK, PRECISION)
            state1, found, scores = _part(
                q, k, k_at, live, state1, added, total, found, scores, ROWS, ROWS, DK, PRECISION
            )
            if PARTS > 2:
                state2, found, scores = _part(
                    q, k, k_at, live, state2, added, total, found, scores, 2 * ROWS, ROWS, DK, PRECISION
                )
                state3, found, scores = _part(
                    q, k, k_at, live, state3, added, total, found, scores, 3 * ROWS, ROWS, DK, PRECISION
                )

            weights = tl.where(token[:, None] >= token[None, :], scores * tl.exp(sums), 0.0)
            found = tl.dot(weights, value, found * from_start, input_precision=PRECISION)
            tl.store(out + v_at, found, mask=inside)
        target = tl.load(segments + segment * 6 + 3)
        if tokens > 0:
            store_state(new_states, target, state0, head, part, 0, H, DK, DV, N, ROWS, BLOCK_V)
            store_state(new_states, target, state1, head, part, ROWS, H, DK, DV, N, ROWS, BLOCK_V)
            if PARTS > 2:
                store_state(new_states, target, state2, head, part, 2 * ROWS, H, DK, DV, N, ROWS, BLOCK_V)
                store_state(new_states, target, state3, head, part, 3 * ROWS, H, DK, DV, N, ROWS, BLOCK_V)


@jit
def scan_steps(
    segments,
    q,
    k,
    v,
    g,
    states,
    out,
    new_states,
    H: tl.constexpr,
    G: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    N: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Process a sequence's tokens one at a time; programs and arguments are those of `scan`."""
    parts: tl.constexpr = V_COLUMNS // BLOCK_V
    head, part, run = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.program_id(1)
    count = tl.load(segments + run * 6 + 5)
    if count == 0:
        return
    source = tl.load(segments + run * 6 + 2)
    group = head // (H // G)
    state = load_state(states, source, head, part, 0, H, DK, DV, N, K_COLUMNS, BLOCK_V)
    column = tl.arange(0, K_COLUMNS)
    v_column = part * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = column < DK, v_column < DV
    for segment in range(run, run + count):
        start, tokens = tl.load(segments + segment * 6), tl.load(segments + segment * 6 + 1)
        for i in range(tokens):
            at = (start + i).to(tl.int64)
            query = tl.load(q + (at * G + group) * DK + column, mask=in_k, other=0.0)
            key = tl.load(k + (at * G + group) * DK + column, mask=in_k, other=0.0)
            value = tl.load(v + (at * H + head) * DV + v_column, mask=in_v, other=0.0)
            state = state * tl.exp(tl.load(g + at * H + head)) + key[:, None] * value[None, :]
            tl.store(out + (at * H + head) * DV + v_column, tl.sum(state * query[:, None], 0), mask=in_v)
        target = tl.load(segments + segment * 6 + 3)
        if tokens > 0:
            store_state(new_states, target, state, head, part, 0, H, DK, DV, N, K_COLUMNS, BLOCK_V)
