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

    `x` `[2, ROWS, K / 2]`: even and odd columns; `codes` `[N, K / 2]`: those of column 2i in the low half of byte i;
    `scales` and `zeros` `[N, K / GROUP]`, `y` `[ROWS, N]`.
    """
    HALF: tl.constexpr = BLOCK_K // 2
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < ROWS
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < N
    matrix_row = tl.where(inside, column, 0).to(tl.int64)
    within = tl.arange(0, HALF)
    x_at = x + row[:, None] * (K // 2) + within[None, :]
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
        if GROUP % BLOCK_K == 0:  # one group in an iteration
            at = matrix_row[None, :] * (K // GROUP) + start // GROUP
        else:
            group = tl.minimum((start + 2 * within) // GROUP, K // GROUP - 1)
            at = matrix_row[None, :] * (K // GROUP) + group[:, None]
        scale = tl.load(scales + at).to(tl.float32)
        zero = 8.0
        if zeros is not None:
            zero = tl.load(zeros + at).to(tl.float32)
        low = (((both & 15).to(tl.float32) - zero) * scale).to(x.dtype.element_ty)
        high = (((both >> 4).to(tl.float32) - zero) * scale).to(x.dtype.element_ty)
        acc = tl.dot(even, low, acc, input_precision=PRECISION)
        acc = tl.dot(odd, high, acc, input_precision=PRECISION)
        x_at += HALF
        codes_at += HALF
    at = y + row[:, None].to(tl.int64) * N + column[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=live[:, None] & inside[None, :])
