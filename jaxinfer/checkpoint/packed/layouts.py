"""Layouts of quantised weights: which tensors hold a module's matrix, and how its values are computed from them.

Each function takes the source, the name of a module and what the checkpoint declares, and returns the module's matrix,
or None where the module has no tensors of this layout.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil

import numpy as np

from jaxinfer.checkpoint.packed.bitsandbytes import four_bit, int8_rows
from jaxinfer.checkpoint.packed.declared import Declared
from jaxinfer.checkpoint.packed.matrix import Grid, PackedMatrix, Read, packed_bits, packed_e2m1, plain, transposed
from jaxinfer.checkpoint.packed.tensors import Tensors
from jaxinfer.checkpoint.source import Matrix
from jaxinfer.errors import CheckpointError

Layout = Callable[[Tensors, str, Declared], Matrix | None]

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Position within a word of each of AWQ's eight 4-bit values."""


def scaled(source: Tensors, name: str, declared: Declared) -> PackedMatrix | None:
    """Read FP8 or int8 values with one scale for the tensor, a row, a group of columns or a block.

    `weight * weight_scale`, which DeepSeek-V3 names `weight_scale_inv`; it multiplies as well.
    """
    weight, zeros = f"{name}.weight", f"{name}.weight_zero_point"
    scale = next((one for one in (f"{name}.weight_scale_inv", f"{name}.weight_scale") if source.has(one)), None)
    if scale is None or not source.has(weight, "F8_E4M3", "F8_E5M2", "I8"):
        return None
    shape = source.matrix_shape(weight)
    return PackedMatrix(
        shape,
        lambda *part: source.read(weight, part),
        _grid(source, scale, shape, declared),
        _grid(source, zeros, shape, declared) if source.has(zeros) else None,
        fp8=source.dtype_of(weight) == "F8_E4M3",
        scale_dtype=source.dtype_of(scale),
    )


def pack_quantized(source: Tensors, name: str, declared: Declared) -> PackedMatrix | None:
    """Read the packed integers of compressed-tensors: `(weight_packed - weight_zero_point) * weight_scale`.

    Both are stored plus half of their range. Zero points are packed along the rows.
    """
    packed, scale, zeros = (f"{name}.weight_{part}" for part in ("packed", "scale", "zero_point"))
    if not source.has(packed, "I32"):
        return None
    rows, words = source.matrix_shape(packed)
    stated = [int(size) for size in source.read(source.need(f"{name}.weight_shape")).reshape(-1)]
    fitting = [bits for bits in declared.bits if stated[:-1] == [rows] and ceil(stated[-1] * bits / 32) == words]
    if not fitting:
        raise CheckpointError(
            f"tensor {packed!r} of shape {[rows, words]} does not hold a matrix of shape {stated} (weight_shape) in "
            f"integers of {_listed(declared.bits)} bits, as {declared.where} declares"
        )
    bits, shape = fitting[0], (rows, stated[-1])
    groups = source.matrix_shape(source.need(scale))[1]
    source.expect(scale, (rows, groups))
    grid = _by_group(source, scale, f"{name}.weight_g_idx", shape[1], groups, declared)
    zero = constant(shape, 2 ** (bits - 1))
    if source.has(zeros, "I32"):
        source.expect(zeros, (ceil(rows * bits / 32), groups))
        zero = grid(transposed(packed_bits(source, zeros, bits, words_first=True)))
    return PackedMatrix(
        shape,
        packed_bits(source, packed, bits),
        grid(plain(source, scale)),
        zero,
        bits=bits,
        scale_dtype=source.dtype_of(scale),
    )


def four_bit_floats(source: Tensors, name: str, declared: Declared) -> PackedMatrix | None:
    """Read NVFP4 and MXFP4: 4-bit floating-point values (E2M1), two a byte.

    NVFP4 has an FP8 scale for 16 columns and one for the whole matrix, which multiplies in ModelOpt (`weight_scale_2`)
    and divides in compressed-tensors (`weight_global_scale`). MXFP4 has an exponent of two for 32 columns.
    """
    packed, scale = f"{name}.weight_packed", f"{name}.weight_scale"
    packed = packed if source.has(packed) else f"{name}.weight"
    if not source.has(packed, "U8"):
        return None
    rows, octets = source.matrix_shape(packed)
    shape = (rows, 2 * octets)
    per_scale = 32 if source.dtype_of(source.need(scale)) in ("U8", "F8_E8M0") else 16
    source.expect(scale, (rows, ceil(shape[1] / per_scale)))
    factor = np.float32(1)
    if per_scale == 16:
        multiplies = source.has(f"{name}.weight_scale_2")
        stored = source.scalar(source.need(f"{name}.weight_scale_2" if multiplies else f"{name}.weight_global_scale"))
        factor = stored if multiplies else 1 / stored
    read = _scales(source, scale)
    return PackedMatrix(shape, packed_e2m1(source, packed), Grid(lambda *part: read(*part) * factor, 1, per_scale))


def gptq(source: Tensors, name: str, declared: Declared) -> PackedMatrix | None:
    """Read GPTQ's integers: `(qweight - qzeros) * scales`.

    `qweight` is packed along the columns of the matrix, `[words, rows]`; `qzeros` along its rows, `[groups, words]`;
    `scales` are `[groups, rows]`. `g_idx` is the group of each column, in any order if `desc_act` was on.
    """
    if not source.has(f"{name}.qweight"):
        return None
    qweight, scales, zeros = (source.need(f"{name}.{part}") for part in ("qweight", "scales", "qzeros"))
    bits, (words, rows) = declared.bits[0], source.matrix_shape(qweight)
    columns, groups = words * 32 // bits, source.matrix_shape(scales)[0]
    source.expect(scales, (groups, rows))
    source.expect(zeros, (groups, ceil(rows * bits / 32)))
    grid = _by_group(source, scales, f"{name}.g_idx", columns, groups, declared)
    stored, offset = transposed(packed_bits(source, zeros, bits)), np.float32(declared.zero_offset)
    return PackedMatrix(
        (rows, columns),
        packed_bits(source, qweight, bits, words_first=True),
        grid(transposed(plain(source, scales))),
        grid(lambda *part: stored(*part) + offset),
        bits=bits,
        scale_dtype=source.dtype_of(scales),
    )


def awq(source: Tensors, name: str, declared: Declared) -> PackedMatrix | None:
    """Read AWQ's integers: `(qweight - qzeros) * scales`, all transposed and packed along the rows of the matrix."""
    if not source.has(f"{name}.qweight"):
        return None
    qweight, scales, zeros = (source.need(f"{name}.{part}") for part in ("qweight", "scales", "qzeros"))
    (columns, words), groups = source.matrix_shape(qweight), source.matrix_shape(scales)[0]
    rows = words * 8
    source.expect(scales, (groups, rows))
    source.expect(zeros, (groups, words))
    grid = _by_group(source, scales, "", columns, groups, declared)
    return PackedMatrix(
        (rows, columns),
        transposed(packed_bits(source, qweight, 4, order=AWQ_ORDER)),
        grid(transposed(plain(source, scales))),
        grid(transposed(packed_bits(source, zeros, 4, order=AWQ_ORDER))),
        bits=4,
        scale_dtype=source.dtype_of(scales),
    )


def mlx(source: Tensors, name: str, declared: Declared) -> PackedMatrix | None:
    """Read MLX's integers: `weight * scales + biases`, with one scale and bias for a group of columns."""
    weight, scales = f"{name}.weight", f"{name}.scales"
    if not source.has(weight, "U32") or not source.has(scales):
        return None
    (rows, words), groups = source.matrix_shape(weight), source.matrix_shape(scales)[1]
    widths = [
        (bits, size) for bits in declared.bits for size in declared.group_sizes if groups * size * bits == words * 32
    ]
    if not widths:
        raise CheckpointError(
            f"tensors {weight!r} of shape {[rows, words]} and {scales!r} of shape {[rows, groups]} do not fit integers "
            f"of {_listed(declared.bits)} bits in groups of {_listed(declared.group_sizes)}, which {declared.where} "
            "declares"
        )
    (bits, size), biases = widths[0], source.need(f"{name}.biases")
    for one in (scales, biases):
        source.expect(one, (rows, groups))
    return PackedMatrix(
        (rows, groups * size),
        packed_bits(source, weight, bits),
        Grid(plain(source, scales), 1, size),
        biases=Grid(plain(source, biases), 1, size),
    )


LAYOUTS: Mapping[str, Sequence[Layout]] = {
    "fp8": (scaled,),
    "compressed-tensors": (pack_quantized, four_bit_floats, scaled),
    "modelopt": (four_bit_floats, scaled),
    "gptq": (gptq,),
    "awq": (awq,),
    "bitsandbytes": (four_bit, int8_rows),
    "mlx": (mlx,),
}
"""Layouts of each method of `Declared`; the first that matches a module's tensors is used."""


def constant(shape: tuple[int, int], value: float) -> Grid:
    """Return the grid of one value for a whole matrix of this shape."""
    return Grid(lambda rows, columns: np.full((1, 1), value, np.float32), *shape)


def _scales(source: Tensors, name: str) -> Read:
    """Return the reader of scales; scales of U8 are exponents of two (E8M0)."""
    if source.dtype_of(name) != "U8":
        return plain(source, name)
    return lambda rows, columns: np.exp2(source.read(name, (rows, columns)).astype(np.float32) - np.float32(127))


def _grid(source: Tensors, name: str, shape: tuple[int, int], declared: Declared) -> Grid:
    """Return the scales or zero points of a matrix; the shape says whether a block, a row or all share one."""
    stored = tuple(source.info(name).shape)
    if stored in ((), (1,), (1, 1)):
        return constant(shape, float(source.scalar(name)))
    if stored in ((shape[0],), (shape[0], 1)):
        values = source.read(name).astype(np.float32).reshape(-1, 1)
        return Grid(lambda rows, columns: values[rows, columns], 1, shape[1])
    blocks = [declared.block] if declared.block else [(1, size) for size in declared.group_sizes if size > 0]
    for rows, columns in blocks:
        if stored == (ceil(shape[0] / rows), ceil(shape[1] / columns)):
            return Grid(_scales(source, name), rows, columns)
    shared = " or ".join(f"{rows} x {columns}" for rows, columns in blocks) or "no size"
    raise CheckpointError(
        f"tensor {name!r} of shape {list(stored)} does not fit a matrix of shape {list(shape)}: {declared.where} "
        f"declares blocks of {shared}"
    )


def _by_group(
    source: Tensors, scales: str, index: str, columns: int, groups: int, declared: Declared
) -> Callable[[Read], Grid]:
    """Return the constructor of grids with an entry for each row and each group of columns.

    Args:
        source: source of the tensors.
        scales: name of the scales, for messages.
        index: name of the tensor of each column's group; without it groups are in order.
        columns: columns of the matrix.
        groups: groups of the scales.
        declared: declared format, which has the sizes that a group may have.
    """
    sizes = [columns if size == -1 else size for size in declared.group_sizes or (-1,)]
    size = next((size for size in sizes if ceil(columns / size) == groups), None)
    if size is None:
        raise CheckpointError(
            f"tensor {scales!r} has {groups} group(s) for {columns} columns: {declared.where} declares groups of "
            f"{_listed(declared.group_sizes)}"
        )
    if not source.has(index):
        return partial(Grid, columns=size)
    source.expect(index, (columns,))
    order = source.read(index).astype(np.int64)
    if order.size and not 0 <= order.min() <= order.max() < groups:
        raise CheckpointError(f"tensor {index!r} has groups from {order.min()} to {order.max()}; there are {groups}")
    if np.array_equal(order, np.arange(columns) // size):
        return partial(Grid, columns=size)
    return partial(Grid, order=order)


def _listed(values: Sequence[int]) -> str:
    return " or ".join(map(str, values)) or "unknown"
