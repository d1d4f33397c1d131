"""Triton kernels of products. Imports triton, so it is imported only when launched (`triton_grouped`, `_packed`)."""

import triton.language as tl

from jaxinfer.kernels.triton.jit import jit


@jit
def grouped(
    tiles,
    x,
    weight,
    x_scales,
    scales,
    y,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply one tile of rows of one group with BLOCK_N rows of its matrix.

    `tiles` `[*, 3]`: group, first row, rows (0: none); `x` `[R, K]`, `weight` `[E, N, K]`, `x_scales` `[R]` and
    `scales` `[E, N]` of int8, `y` `[R, N]`.
    """
    tile = tl.program_id(1)
    count = tl.load(tiles + tile * 3 + 2)
    if count > 0:
        group = tl.load(tiles + tile * 3).to(tl.int64)
        row = tl.load(tiles + tile * 3 + 1).to(tl.int64) + tl.arange(0, BLOCK_M)
        live = tl.arange(0, BLOCK_M) < count
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < N
        # Columns out of range read column 0: with a mask the loads would not be vectorized.
        matrix_row = group * N + tl.where(inside, column, 0)
        within = tl.arange(0, BLOCK_K)
        x_at = x + row[:, None] * K + within[None, :]
        weight_at = weight + matrix_row[None, :] * K + within[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if scales is None else tl.int32)
        for start in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                rows = tl.load(x_at, mask=live[:, None], other=0)
                columns = tl.load(weight_at)
            else:
                left = within < K - start
                rows = tl.load(x_at, mask=live[:, None] & left[None, :], other=0)
                columns = tl.load(weight_at, mask=left[:, None], other=0)
            if scales is None:
                acc = tl.dot(rows, columns, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(rows, columns, acc, out_dtype=tl.int32)
            x_at += BLOCK_K
            weight_at += BLOCK_K
        if scales is not None:
            own = tl.load(x_scales + row, mask=live, other=0.0)
            acc = acc.to(tl.float32) * own[:, None] * tl.load(scales + matrix_row)[None, :]
        at = y + row[:, None] * N + column[None, :]
        tl.store(at, acc.to(y.dtype.element_ty), mask=live[:, None] & inside[None, :])


@jit
def packed(
    tiles,
    x,
    codes,
    scales,
    zeros,
    y,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply BLOCK_M rows with BLOCK_N rows of a weight in codes of 4 bits, whose values are made in registers.

    `tiles` as in `grouped`, None for a single matrix; `x` `[2, ROWS, K / 2]`: even and odd columns; `codes` `[E, N, K /
    2]`: those of column 2i in the low half of byte i; `scales` and `zeros` `[E, N, K / GROUP]`, `y` `[ROWS, N]`.
    """
    HALF: tl.constexpr = BLOCK_K // 2
    tile = tl.program_id(1)
    if tiles is None:
        group, first, count = 0, tile * BLOCK_M, ROWS - tile * BLOCK_M
    else:
        group = tl.load(tiles + tile * 3).to(tl.int64)
        first = tl.load(tiles + tile * 3 + 1)
        count = tl.load(tiles + tile * 3 + 2)
    if count > 0:
        row = first + tl.arange(0, BLOCK_M)
        live = tl.arange(0, BLOCK_M) < count
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < N
        matrix_row = group * N + tl.where(inside, column, 0).to(tl.int64)
        within = tl.arange(0, HALF)
        x_at = x + row[:, None].to(tl.int64) * (K // 2) + within[None, :]
        codes_at = codes + matrix_row[None, :] * (K // 2) + within[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                even = tl.load(x_at, mask=live[:, None], other=0)
                odd = tl.load(x_at + ROWS * (K // 2), mask=live[:, None], other=0)
                both = tl.load(codes_at)
            else:
                left = within < (K - start) // 2
                even = tl.load(x_at, mask=live[:, None] & left[None, :], other=0)
                odd = tl.load(x_at + ROWS * (K // 2), mask=live[:, None] & left[None, :], other=0)
                both = tl.load(codes_at, mask=left[:, None], other=0)
            # Groups of an iteration: one, several whole ones, or another for each column.
            if GROUP % BLOCK_K == 0:
                number = start // GROUP + tl.arange(0, 1)
            elif BLOCK_K % GROUP == 0:
                number = tl.minimum(start // GROUP + tl.arange(0, BLOCK_K // GROUP), K // GROUP - 1)
            else:
                number = tl.minimum((start + 2 * within) // GROUP, K // GROUP - 1)
            at = matrix_row[None, :] * (K // GROUP) + number[:, None]
            scale = tl.load(scales + at)
            if scales.dtype.element_ty == tl.uint8:
                scale = by_row(exponents(scale), HALF)
                low, high = floats(both), floats(both >> 4)
            else:
                scale, zero = by_row(scale.to(tl.float32), HALF), 8.0
                if zeros is not None:
                    zero = by_row(tl.load(zeros + at).to(tl.float32), HALF)
                low, high = (both & 15).to(tl.float32) - zero, (both >> 4).to(tl.float32) - zero
            acc = tl.dot(even, (low * scale).to(x.dtype.element_ty), acc, input_precision=PRECISION)
            acc = tl.dot(odd, (high * scale).to(x.dtype.element_ty), acc, input_precision=PRECISION)
            x_at += HALF
            codes_at += HALF
        at = y + row[:, None].to(tl.int64) * N + column[None, :]
        tl.store(at, acc.to(y.dtype.element_ty), mask=live[:, None] & inside[None, :])


@jit
def by_row(values, ROWS: tl.constexpr):
    """Return values of equal numbers of rows, `[groups, N]`, for each of ROWS rows, or one group's as they are."""
    if values.shape[0] == 1 or values.shape[0] == ROWS:
        return values
    else:
        shape: tl.constexpr = (values.shape[0], ROWS // values.shape[0], values.shape[1])
        return tl.broadcast_to(values[:, None, :], shape).reshape(ROWS, values.shape[1])


@jit
def exponents(bits):
    """Return the scales of MXFP4's exponents, `2^(bits - 127)`, NaN for 255."""
    bits = bits.to(tl.uint32)
    return ((bits << 23) | ((bits == 255).to(tl.uint32) << 22)).to(tl.float32, bitcast=True)


@jit
def floats(codes):
    """Return the values of floats of 4 bits (e2m1) in the low halves of bytes.

    Sign, exponent and mantissa are put where float16 has them, which differs in the bias of the exponent alone.
    """
    codes = codes.to(tl.uint16)
    bits = ((codes & 8) << 12) | ((codes & 7) << 9)
    return (bits.to(tl.float16, bitcast=True) * 16384.0).to(tl.float32)


@jit
def fp8(
    x,
    codes,
    x_scales,
    scales,
    y,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply BLOCK_M rows with BLOCK_N rows of a weight in codes of FP8.

    `x` `[ROWS, K]`: with `x_scales` `[ROWS]` codes, too; `codes` `[N, K]`, `scales` `[N, K / GROUP]`, `y` `[ROWS, N]`.
    Codes are bits. An iteration has columns of one group.
    """
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < ROWS
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < N
    matrix_row = tl.where(inside, column, 0).to(tl.int64)
    within = tl.arange(0, BLOCK_K)
    # Rows out of range read row 0, columns likewise: with a mask the loads would not be asynchronous.
    x_at = x + tl.where(live, row, 0).to(tl.int64)[:, None] * K + within[None, :]
    codes_at = codes + matrix_row[None, :] * K + within[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            rows = tl.load(x_at)
            bits = tl.load(codes_at)
        else:
            left = within < K - start
            rows = tl.load(x_at, mask=left[None, :], other=0)
            bits = tl.load(codes_at, mask=left[:, None], other=0)
        columns = bits.to(tl.float8e4nv, bitcast=True)
        if x_scales is not None:
            # Tensor cores add up FP8 with few bits: sums of so many columns are added in float32.
            acc = tl.dot(rows.to(tl.float8e4nv, bitcast=True), columns, acc, max_num_imprecise_acc=BLOCK_K)
        elif GROUP == K:
            acc = tl.dot(rows, columns.to(rows.dtype), acc, input_precision=PRECISION)
        else:
            scale = tl.load(scales + matrix_row * (K // GROUP) + start // GROUP).to(tl.float32)
            acc += tl.dot(rows, columns.to(rows.dtype), input_precision=PRECISION) * scale[None, :]
        x_at += BLOCK_K
        codes_at += BLOCK_K
    if x_scales is not None:
        acc *= tl.load(x_scales + row, mask=live, other=0.0)[:, None]
    if GROUP == K:
        acc *= tl.load(scales + matrix_row).to(tl.float32)[None, :]
    at = y + row[:, None].to(tl.int64) * N + column[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=live[:, None] & inside[None, :])


@jit
def rows_to_fp8(x, codes, scales, K: tl.constexpr, BLOCK: tl.constexpr):
    """Quantise one row of `x` `[T, K]` to codes of FP8, as bits, and a scale, as `fp8_matmul.quantise`."""
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    wrong = tl.zeros((BLOCK,), tl.float32)  # NaN for values that are not finite, which a maximum leaves out
    for start in range(0, K, BLOCK):
        values = tl.load(x + row * K + start + within, mask=within < K - start, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
        wrong += values * 0
    scale = tl.maximum(tl.max(largest, 0) * (1 / 448), 1e-30) + tl.sum(wrong, 0)
    for start in range(0, K, BLOCK):
        inside = within < K - start
        values = tl.load(x + row * K + start + within, mask=inside, other=0).to(tl.float32)
        made = (values / scale).to(tl.float8e4nv)
        tl.store(codes + row * K + start + within, made.to(tl.uint8, bitcast=True), mask=inside)
    tl.store(scales + row, scale)
