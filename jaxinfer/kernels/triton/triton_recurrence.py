"""Triton kernels of the gated delta rule (`kernels.state.delta`). Imports triton, so it is imported only when launched.

`prepare` computes what does not depend on the state, for all chunks in parallel; `advance` then takes one sequence
through its chunks in order, with a part of a head's state in registers. `step` is the plain recurrence: decode, and
steps whose bits must not depend on where chunks begin. A loop of XLA would return to the host for each iteration.

Rows of all arrays are float32 and contiguous. Parameters annotated `tl.constexpr` are compile-time constants; all
others are pointers. `triton_delta` makes their arguments.
"""

import triton.language as tl

from jaxinfer.kernels.triton.jit import jit
from jaxinfer.kernels.triton.triton_states import load_state, store_state


@jit
def prepare(
    chunks,
    q,
    k,
    v,
    g,
    beta,
    reads,
    queries,
    keys,
    values,
    local,
    decay,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DECAYS: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the state-independent part of a chunk of one head: program (x, y) is head x of chunk y.

    From the state S at its start, the chunk's updates are `values - reads S`, its outputs `local + queries S`, and the
    state at its end `decay S + keys^T updates`. Tokens are taken one by one, so that every decay is a product of
    numbers in [0, 1] and nothing overflows or cancels. Tokens after the chunk's last have keys of zeros and no decay.

    Args:
        chunks: `[C, 2]` int32, first token and tokens (0: nothing to do).
        q: `[T, H, DK]`, k likewise, v `[T, H, DV]`, g `[T, H, DECAYS]`, beta `[T, H, 1]`.
        reads: `[C, H, SIZE, K_COLUMNS]`.
        queries: the same shape.
        keys: the same shape.
        values: `[C, H, SIZE, V_COLUMNS]`.
        local: the same shape.
        decay: `[C, H, K_COLUMNS]`.
    """
    head, chunk = tl.program_id(0), tl.program_id(1)
    count = tl.load(chunks + chunk * 2 + 1)
    if count == 0:
        return
    first = tl.load(chunks + chunk * 2).to(tl.int64) * H + head
    place = chunk.to(tl.int64) * H + head
    token = tl.arange(0, SIZE)
    column = tl.arange(0, K_COLUMNS)
    inside = column < DK
    g_column = column if DECAYS > 1 else column * 0

    total = tl.full([K_COLUMNS], 1.0, tl.float32)
    own = tl.zeros([SIZE, K_COLUMNS], tl.float32)
    read = tl.zeros([SIZE, K_COLUMNS], tl.float32)
    query = tl.zeros([SIZE, K_COLUMNS], tl.float32)
    inverse = tl.zeros([SIZE, SIZE], tl.float32)
    weights = tl.zeros([SIZE, SIZE], tl.float32)
    for i in range(SIZE):
        at = first + i * H
        live = inside & (column * 0 + i < count)
        new = (token == i)[:, None]
        q_row = tl.load(q + at * DK + column, mask=live, other=0.0)
        k_row = tl.load(k + at * DK + column, mask=live, other=0.0)
        fade = tl.exp(tl.load(g + at * DECAYS + g_column, mask=live, other=0.0))
        scaled = k_row * tl.load(beta + at + column * 0, mask=live, other=0.0)
        total *= fade
        own = tl.where(new, k_row[None, :], own * fade[None, :])
        earlier = tl.where(token < i, tl.sum(own * scaled[None, :], 1), 0.0)
        row = tl.where(token == i, 1.0, 0.0) - tl.sum(earlier[:, None] * inverse, 0)
        inverse = tl.where(new, row[None, :], inverse)
        weights = tl.where(new, tl.sum(own * q_row[None, :], 1)[None, :], weights)
        read = tl.where(new, (scaled * total)[None, :], read)
        query = tl.where(new, (q_row * total)[None, :], query)

    within = (place * SIZE + token)[:, None]
    tl.store(decay + place * K_COLUMNS + column, total)
    tl.store(keys + within * K_COLUMNS + column[None, :], own)
    read = tl.dot(inverse, read, input_precision=PRECISION)
    tl.store(reads + within * K_COLUMNS + column[None, :], read)
    query -= tl.dot(weights, read, input_precision=PRECISION)
    tl.store(queries + within * K_COLUMNS + column[None, :], query)
    v_column = tl.arange(0, V_COLUMNS)
    live = token < count
    v_at = (first + token * H)[:, None] * DV + v_column[None, :]
    value = tl.load(v + v_at, mask=live[:, None] & (v_column < DV)[None, :], other=0.0)
    value *= tl.load(beta + first + token * H, mask=live, other=0.0)[:, None]
    value = tl.dot(inverse, value, input_precision=PRECISION)
    tl.store(values + within * V_COLUMNS + v_column[None, :], value)
    tl.store(local + within * V_COLUMNS + v_column[None, :], tl.dot(weights, value, input_precision=PRECISION))


@jit
def advance(
    segments,
    reads,
    queries,
    keys,
    values,
    local,
    decay,
    states,
    out,
    new_states,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    N: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Process a sequence's chunks in order: program (x, y) is BLOCK_V columns of a head's values, and segment y.

    Args:
        segments: `[R, 6]` int32: first token, tokens, source, target, first chunk, and the number of segments of the
            run that begins here (0: another program computes this segment, or it is padding).
        reads: result of `prepare`; likewise queries, keys, values, local and decay.
        states: `[N, H, DK, DV]`, the same memory as new_states.
        out: `[T, H, DV]`; tokens of no segment are not written.
    """
    parts: tl.constexpr = V_COLUMNS // BLOCK_V
    head, part, run = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.program_id(1)
    count = tl.load(segments + run * 6 + 5)
    if count == 0:
        return
    source = tl.load(segments + run * 6 + 2)
    # Two halves of the keys: fragments of products over all of them at once would not fit in registers.
    HALF: tl.constexpr = K_COLUMNS // 2
    upper = load_state(states, source, head, part, 0, H, DK, DV, N, HALF, BLOCK_V)
    lower = load_state(states, source, head, part, HALF, H, DK, DV, N, HALF, BLOCK_V)
    token = tl.arange(0, SIZE)
    v_column = part * BLOCK_V + tl.arange(0, BLOCK_V)
    for segment in range(run, run + count):
        start, tokens = tl.load(segments + segment * 6), tl.load(segments + segment * 6 + 1)
        first = tl.load(segments + segment * 6 + 4)
        for begin in range(0, tokens, SIZE):
            place = (first + begin // SIZE).to(tl.int64) * H + head
            row = (place * SIZE + token)[:, None]
            above = row * K_COLUMNS + tl.arange(0, HALF)[None, :]
            found = tl.load(local + row * V_COLUMNS + v_column[None, :])
            found = tl.dot(tl.load(queries + above), upper, found, input_precision=PRECISION)
            found = tl.dot(tl.load(queries + above + HALF), lower, found, input_precision=PRECISION)
            read = tl.dot(tl.load(reads + above), upper, input_precision=PRECISION)
            read = tl.dot(tl.load(reads + above + HALF), lower, read, input_precision=PRECISION)
            update = tl.load(values + row * V_COLUMNS + v_column[None, :]) - read
            fade = decay + place * K_COLUMNS + tl.arange(0, HALF)
            upper *= tl.load(fade)[:, None]
            lower *= tl.load(fade + HALF)[:, None]
            upper = tl.dot(tl.trans(tl.load(keys + above)), update, upper, input_precision=PRECISION)
            lower = tl.dot(tl.trans(tl.load(keys + above + HALF)), update, lower, input_precision=PRECISION)
            out_at = (start + begin + token).to(tl.int64) * H + head
            stored = (begin + token < tokens)[:, None] & (v_column < DV)[None, :]
            tl.store(out + out_at[:, None] * DV + v_column[None, :], found, mask=stored)
        target = tl.load(segments + segment * 6 + 3)
        if tokens > 0:
            store_state(new_states, target, upper, head, part, 0, H, DK, DV, N, HALF, BLOCK_V)
            store_state(new_states, target, lower, head, part, HALF, H, DK, DV, N, HALF, BLOCK_V)


@jit
def step(
    segments,
    q,
    k,
    v,
    g,
    beta,
    states,
    out,
    new_states,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DECAYS: tl.constexpr,
    N: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Process a sequence's tokens one at a time; programs and arguments are those of `advance` and `prepare`."""
    parts: tl.constexpr = V_COLUMNS // BLOCK_V
    head, part, run = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.program_id(1)
    count = tl.load(segments + run * 6 + 5)
    if count == 0:
        return
    source = tl.load(segments + run * 6 + 2)
    state = load_state(states, source, head, part, 0, H, DK, DV, N, K_COLUMNS, BLOCK_V)
    column = tl.arange(0, K_COLUMNS)
    v_column = part * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = column < DK, v_column < DV
    g_column = column if DECAYS > 1 else column * 0
    for segment in range(run, run + count):
        start, tokens = tl.load(segments + segment * 6), tl.load(segments + segment * 6 + 1)
        for i in range(tokens):
            place = (start + i).to(tl.int64) * H + head
            query = tl.load(q + place * DK + column, mask=in_k, other=0.0)
            key = tl.load(k + place * DK + column, mask=in_k, other=0.0)
            fade = tl.exp(tl.load(g + place * DECAYS + g_column, mask=in_k, other=0.0))
            value = tl.load(v + place * DV + v_column, mask=in_v, other=0.0)
            strength = tl.load(beta + place)
            state *= fade[:, None]
            update = strength * (value - tl.sum(state * key[:, None], 0))
            state += key[:, None] * update[None, :]
            tl.store(out + place * DV + v_column, tl.sum(state * query[:, None], 0), mask=in_v)
        target = tl.load(segments + segment * 6 + 3)
        if tokens > 0:
            store_state(new_states, target, state, head, part, 0, H, DK, DV, N, K_COLUMNS, BLOCK_V)
