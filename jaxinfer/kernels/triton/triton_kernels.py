"""Triton kernels of attention over the paged cache. Imports triton, so it is imported only when chosen.

`attend` is the online softmax of FlashAttention-2 (arXiv:2307.08691) over the blocks of a table, for decode and chunked
prefill; `combine` merges the split-K pieces of a row (Flash-Decoding). `triton_attention` makes their arguments.
Parameters annotated `tl.constexpr` are compile-time constants; all others are pointers.

Triton has no structs, so each call lists all pointers and constants, and signatures are long.
"""

import triton.language as tl

from jaxinfer.kernels.triton.jit import jit

LEAST = tl.constexpr(-1e30)
"""Initial value of running maxima. Finite, so that a query that sees no key gives exp2(-inf - LEAST) = 0, not NaN."""
LOG2E = tl.constexpr(1.4426950408889634)


@jit
def _rows(start, live, FIRST: tl.constexpr, WIDTH: tl.constexpr, LIMIT: tl.constexpr, MASKED: tl.constexpr):
    """Load columns [FIRST, FIRST + WIDTH) of rows at `start` `[R]`; 0 from column LIMIT on and for dead rows."""
    columns = FIRST + tl.arange(0, WIDTH)
    at = start[:, None] + columns[None, :]
    # Omit the mask where it always holds: masked loads are not vectorized.
    if FIRST + WIDTH > LIMIT:
        x = tl.load(at, mask=live[:, None] & (columns < LIMIT)[None, :], other=0.0)
    elif MASKED:
        x = tl.load(at, mask=live[:, None], other=0.0)
    else:
        x = tl.load(at)
    return x


@jit
def _widen(codes, FP8: tl.constexpr, DTYPE: tl.constexpr):
    """Convert codes of a quantised cache to DTYPE, which holds them exactly."""
    if FP8:
        codes = codes.to(tl.float8e4nv, bitcast=True)
    else:
        codes = codes.to(tl.float32)  # Triton's interpreter cannot convert integers to bfloat16
    return codes.to(DTYPE)


@jit
def _scan(
    top,
    total,
    acc,
    first,
    stop,
    end,
    q,
    q_rest,
    q_at,
    token_of,
    fresh,
    head,
    tables,
    k,
    v,
    keys,
    values,
    k_scales,
    v_scales,
    key_scales,
    value_scales,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    K_ALIGN: tl.constexpr,
    V_ALIGN: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    P: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    FP8: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Run the online softmax over keys [first, stop), BLOCK_N at a time; unless MASKED, every query sees all.

    With `key_scales`, keys and values are codes: their scales multiply scores and weights.
    """
    for start in range(first, stop, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        live = at < end
        old = at < fresh
        block = tl.load(tables + at // P, mask=live & old, other=0).to(tl.int64)
        place = (block * K + head) * P + at % P  # index into the cache's [N, K, P] rows
        own = (at + token_of).to(tl.int64)
        # The compiler cannot infer the alignment of a selected pointer and would load element by element.
        key_at = keys + place * D
        if k is not None:
            key_at = tl.where(old, key_at, k + own * K_ROW + head * D)
        key_at = tl.multiple_of(key_at, K_ALIGN)
        key = _rows(key_at, live, 0, MAIN, D, MASKED)
        if key_scales is not None:
            key = _widen(key, FP8, q.dtype)
            scale_at = key_scales + place * WIDE
            if k is not None:
                scale_at = tl.where(old, scale_at, k_scales + own * (K_ROW // D) + head)
            key_scale = tl.load(scale_at, mask=live, other=0.0).to(tl.float32)
        scores = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        if REST > 0:
            rest = _rows(key_at, live, MAIN, REST, D, MASKED)
            if key_scales is not None:
                rest = _widen(rest, FP8, q.dtype)
            scores = tl.dot(q_rest, tl.trans(rest), scores, input_precision=PRECISION)
        if key_scales is not None:
            scores *= key_scale[None, :]
        if SOFTCAP is None:
            scores *= SCALE * LOG2E
        else:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1)
            scores = 1 - 2 / (tl.exp2(scores * (2 * LOG2E * SCALE / SOFTCAP)) + 1)
            scores *= SOFTCAP * LOG2E
        if MASKED:
            seen = (at[None, :] <= q_at[:, None]) & live[None, :]
            if CHUNKED:
                seen &= at[None, :] >= (q_at // WINDOW * WINDOW)[:, None]
            elif WINDOW is not None:
                seen &= at[None, :] > q_at[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        if values is None:
            value = key
            if key_scales is not None:
                weights *= key_scale[None, :]
        else:
            value_at = values + place * DV
            if v is not None:
                value_at = tl.where(old, value_at, v + own * V_ROW + head * DV)
            value_at = tl.multiple_of(value_at, V_ALIGN)
            value = _rows(value_at, live, 0, V_COLUMNS, DV, MASKED)
            if value_scales is not None:
                value = _widen(value, FP8, q.dtype)
                scale_at = value_scales + place * WIDE
                if v is not None:
                    scale_at = tl.where(old, scale_at, v_scales + own * (V_ROW // DV) + head)
                weights *= tl.load(scale_at, mask=live, other=0.0).to(tl.float32)[None, :]
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return top, total, acc


@jit
def _keep(
    new,
    cache,
    token,
    count,
    head,
    blocks,
    offsets,
    K: tl.constexpr,
    ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
    APART: tl.constexpr,
):
    """Copy one head of tokens [token, token + count) of `new`, ROW elements apart, to the cache `[N, K, P, APART]`.

    A head has WIDTH elements.
    """
    query = tl.arange(0, TILE)
    columns = tl.arange(0, COLUMNS)
    block = tl.load(blocks + token + query, mask=query < count, other=N).to(tl.int64)
    offset = tl.load(offsets + token + query, mask=query < count, other=0)
    kept = ((block >= 0) & (block < N))[:, None] & (columns < WIDTH)[None, :]
    source = (token + query).to(tl.int64) * ROW + head * WIDTH
    target = ((block * K + head) * P + offset) * APART
    x = tl.load(new + source[:, None] + columns[None, :], mask=kept, other=0.0)
    tl.store(cache + target[:, None] + columns[None, :], x, mask=kept)


@jit
def attend(
    items,
    tables,
    blocks,
    offsets,
    q,
    k,
    v,
    keys,
    values,
    k_scales,
    v_scales,
    key_scales,
    value_scales,
    sinks,
    out,
    new_keys,
    new_values,
    new_key_scales,
    new_value_scales,
    sums,
    stats,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    MEMBERS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    Q_ROW: tl.constexpr,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    Q_FIRST: tl.constexpr,
    K_FIRST: tl.constexpr,
    V_FIRST: tl.constexpr,
    K_ALIGN: tl.constexpr,
    V_ALIGN: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    WIDE: tl.constexpr,
    W: tl.constexpr,
    TILE: tl.constexpr,
    UNMASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    FP8: tl.constexpr,
):
    """Write the tokens of one work item to the cache and attend to its keys, for one kv head.

    Program (x, y): x enumerates kv heads and parts of MEMBERS of the G query heads of each, y the work items. A query
    tile has BLOCK_M rows, MEMBERS heads per query, so that all heads of a group share the keys and values read.

    Keys from position `fresh` on are read from k and v, where they are contiguous, and never from the cache, so that
    other programs of the same launch may write them there. Without k and v (and blocks, offsets, new_keys and
    new_values) all keys are in the cache, and nothing is written.

    Args:
        items: `[I, 8]` int32: row of the tables, first token, its position, queries (0: nothing to do), first key, end
            of the keys, `fresh`, whether the item is one of several pieces.
        tables: `[B, W]` block ids.
        blocks: `[T]` slots of the tokens; None if nothing is written.
        offsets: `[T]`, likewise.
        q: `[T, H, D]`, starting Q_FIRST elements into its array, Q_ROW elements per token; k and v likewise.
        k: `[T, K, D]` or None.
        v: `[T, K, DV]` or None (columns of the keys).
        keys: `[N, K, P, D]`, the same memory as new_keys.
        values: `[N, K, P, DV]`, the same memory as new_values, or None.
        k_scales: `[T, K, 1]` if k, v, keys and values are codes, with rows as far apart as those of k; else None.
        v_scales: likewise; None without v.
        key_scales: `[N, K, P, WIDE]`, of which the first is used, the same memory as new_key_scales, or None.
        value_scales: `[N, K, P, WIDE]`, likewise new_value_scales, or None.
        sinks: `[H]` or None.
        out: `[T, H, DV]`.
        sums: `[I, H, DV]` float32 for pieces; None if there are none.
        stats: `[I, 2, H]` float32 for pieces (maxima in base 2, totals); None if there are none.
    """
    index = tl.program_id(1)
    item = items + index * 8
    count = tl.load(item + 3)
    if count == 0:
        return
    row, token, position = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    first, end, fresh = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    G: tl.constexpr = H // K
    PARTS: tl.constexpr = (G + MEMBERS - 1) // MEMBERS
    head = tl.program_id(0) // PARTS
    first_member = tl.program_id(0) % PARTS * MEMBERS

    rows = tl.arange(0, BLOCK_M)
    query, member = rows // MEMBERS, first_member + rows % MEMBERS
    live = (query < count) & (member < G)
    q_head = head * G + member
    q_token = (token + query).to(tl.int64)
    q_start = q + Q_FIRST + q_token * Q_ROW + q_head * D
    q_at = position + query
    q_tile = _rows(q_start, live, 0, MAIN, D, True)
    q_rest = q_tile
    if REST > 0:
        q_rest = _rows(q_start, live, MAIN, REST, D, True)
    if k is not None:
        k += K_FIRST
        if k_scales is not None:
            k_scales += K_FIRST // D
    if v is not None:
        v += V_FIRST
        if v_scales is not None:
            v_scales += V_FIRST // DV

    top = tl.full([BLOCK_M], LEAST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, V_COLUMNS], tl.float32)
    tables += row * W
    token_of = token - position
    masked_from = first
    if UNMASKED:
        # Keys seen by all queries of a prefill tile need no mask. Decode has a single loop: it is short, and a second
        # loop would have to wait for its first loads again.
        masked_from = first + (position + 1 - first) // BLOCK_N * BLOCK_N
        if CHUNKED:  # queries behind the end of a chunk see none of its keys
            masked_from = tl.where(position % WINDOW + count <= WINDOW, masked_from, first)
        top, total, acc = _scan(
            top,
            total,
            acc,
            first,
            masked_from,
            end,
            q_tile,
            q_rest,
            q_at,
            token_of,
            fresh,
            head,
            tables,
            k,
            v,
            keys,
            values,
            k_scales,
            v_scales,
            key_scales,
            value_scales,
            SCALE,
            WINDOW,
            CHUNKED,
            SOFTCAP,
            K,
            D,
            DV,
            K_ROW,
            V_ROW,
            K_ALIGN,
            V_ALIGN,
            MAIN,
            REST,
            V_COLUMNS,
            P,
            WIDE,
            BLOCK_N,
            PRECISION,
            FP8,
            False,
        )
    top, total, acc = _scan(
        top,
        total,
        acc,
        masked_from,
        end,
        end,
        q_tile,
        q_rest,
        q_at,
        token_of,
        fresh,
        head,
        tables,
        k,
        v,
        keys,
        values,
        k_scales,
        v_scales,
        key_scales,
        value_scales,
        SCALE,
        WINDOW,
        CHUNKED,
        SOFTCAP,
        K,
        D,
        DV,
        K_ROW,
        V_ROW,
        K_ALIGN,
        V_ALIGN,
        MAIN,
        REST,
        V_COLUMNS,
        P,
        WIDE,
        BLOCK_N,
        PRECISION,
        FP8,
        True,
    )

    if k is not None:
        if (end == position + count) & (first_member == 0):
            _keep(k, new_keys, token, count, head, blocks, offsets, K, K_ROW, D, K_COLUMNS, N, P, TILE, D)
            if v is not None:
                _keep(v, new_values, token, count, head, blocks, offsets, K, V_ROW, DV, V_COLUMNS, N, P, TILE, DV)
            if k_scales is not None:
                own: tl.constexpr = K_ROW // D
                _keep(k_scales, new_key_scales, token, count, head, blocks, offsets, K, own, 1, 1, N, P, TILE, WIDE)
            if v_scales is not None:
                row_v: tl.constexpr = V_ROW // DV
                _keep(v_scales, new_value_scales, token, count, head, blocks, offsets, K, row_v, 1, 1, N, P, TILE, WIDE)

    columns = tl.arange(0, V_COLUMNS)
    stored = live[:, None] & (columns < DV)[None, :]
    piece = False
    if sums is not None:
        piece = tl.load(item + 7) != 0
        if piece:
            tl.store(stats + index * 2 * H + q_head, top, mask=live)
            tl.store(stats + (index * 2 + 1) * H + q_head, total, mask=live)
            tl.store(sums + (index * H + q_head)[:, None] * DV + columns[None, :], acc, mask=stored)
    if sinks is not None:
        sink = tl.load(sinks + q_head, mask=live, other=0.0).to(tl.float32) * LOG2E
        new_top = tl.maximum(top, sink)
        total = total * tl.exp2(top - new_top) + tl.exp2(sink - new_top)
        acc *= tl.exp2(top - new_top)[:, None]
    total = tl.where(total == 0, 1.0, total)  # padding sees no key
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (q_token * H + q_head)[:, None] * DV + columns[None, :], result, mask=stored & (not piece))


@jit
def combine(
    spans,
    sums,
    stats,
    sinks,
    out,
    whole,
    H: tl.constexpr,
    DV: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Merge the pieces of one row and head, in order, PIECES at a time. For other arguments see `attend`.

    Args:
        spans: `[B, 2]`, a row's first piece and number of pieces; rows of one piece are already in `whole`, rows of
            none are padding and get 0.
        out: `[B, H, DV]`, in the same memory as `whole`.
        whole: the result.
    """
    head, row = tl.program_id(0), tl.program_id(1)
    first, count = tl.load(spans + row * 2), tl.load(spans + row * 2 + 1)
    if count == 1:
        return
    columns = tl.arange(0, V_COLUMNS)
    one = tl.zeros([1], tl.float32)
    top, total = one + LEAST, one
    if sinks is not None:
        top, total = one + tl.load(sinks + head).to(tl.float32) * LOG2E, one + 1.0
    acc = tl.zeros([V_COLUMNS], tl.float32)
    for start in range(0, count, PIECES):
        at = start + tl.arange(0, PIECES)
        live = at < count
        index = first + at
        tops = tl.load(stats + index * 2 * H + head, mask=live, other=LEAST)
        totals = tl.load(stats + (index * 2 + 1) * H + head, mask=live, other=0.0)
        mask = live[:, None] & (columns < DV)[None, :]
        parts = tl.load(sums + (index * H + head)[:, None] * DV + columns[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        shrink, weights = tl.exp2(top - new_top), tl.exp2(tops - new_top)
        total = total * shrink + tl.sum(totals * weights, 0)
        acc = acc * shrink + tl.sum(parts * weights[:, None], 0)
        top = new_top
    total = tl.where(count == 0, 1.0, total)
    result = (acc / total).to(whole.dtype.element_ty)
    tl.store(whole + (row * H + head) * DV + columns, result, mask=columns < DV)
