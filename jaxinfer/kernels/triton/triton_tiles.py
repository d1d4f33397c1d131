"""Tile sizes of the attention kernel, chosen from shapes before compilation. Estimated; not measured yet."""

from dataclasses import dataclass

from jaxinfer.kernels.triton.triton_launch import Options

TURN_BYTES = 32 << 10
"""Bytes of keys and values that one iteration of a program's loop reads."""


@dataclass(frozen=True)
class Layout:
    """Shapes of an attention call that determine its tiles."""

    heads: int
    """H of this shard."""
    kv_heads: int
    dim: int
    value_dim: int
    latent: bool
    itemsize: int
    """Bytes per element that is multiplied; those of a quantised cache are widened before."""
    tile: int
    """Queries of one row per program; 1 for decode."""
    decode: bool
    codes: bool = False
    """Whether the cache is quantised."""


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of one program. Estimated, not measured."""

    members: int
    """Query heads of a kv head per program."""
    block_m: int
    """Rows of the query tile: queries x members, padded."""
    block_n: int
    """Keys per loop iteration."""
    main: int
    """Key columns in the first matmul, a power of two."""
    rest: int
    """Key columns in the second matmul; 0 for none."""
    value_columns: int
    """Dv padded to a power of two."""
    options: Options

    @property
    def decode_programs(self) -> int:
        """Return the number of decode programs that a multiprocessor runs at a time.

        Its shared memory has room for two, its 65,536 registers only if the sums of one take up to 8192 (MLA's take
        twice as many).
        """
        return 2 if self.block_m * self.value_columns <= 8192 else 1

    def parts(self, group: int) -> int:
        """Return the number of programs that share the G query heads of a kv head."""
        return -(-group // self.members)


def power(size: int, least: int = 16) -> int:
    """Round up to a power of two, as tile axes must be; axes of matmuls have at least 16 elements."""
    return max(least, 1 << (size - 1).bit_length())


def query_rows(value_dim: int, itemsize: int) -> int:
    """Return the rows of the largest query tile whose `[rows, Dv]` float32 accumulator stays in registers.

    With 16-bit elements tensor cores take 128 rows (two warp groups of an H100), or 32 for MLA's Dv of 512. In float32
    there are only ordinary multiplications, which keep both operands in registers: 16.
    """
    if itemsize == 4:
        return 16
    return 32 if value_dim > 256 else 128


def tile(group: int, value_dim: int, itemsize: int) -> int:
    """Return the queries per prefill tile that fill the query tile's rows, for `group` query heads per kv head."""
    return max(1, query_rows(value_dim, itemsize) // group)


def tiling(layout: Layout) -> Tiling:
    """Choose the tiles for a layout.

    The software pipeline keeps the data of two loop iterations in shared memory (227 KiB per multiprocessor on an
    H100); with the query tile that is at most half of it for decode. Five stages let decode load two iterations ahead,
    since block-table loads precede them; prefill, whose matmuls take longer than its loads, loads one ahead.
    """
    main, rest = _split(layout)
    value_columns = main if layout.latent else power(layout.value_dim)
    most = query_rows(layout.value_dim, layout.itemsize)
    # 64 16-bit rows fill a warp group; one decode program of 128 rows is no faster than two of 64.
    most = min(most, 64) if layout.decode else most
    members = min(layout.heads // layout.kv_heads, max(1, most // layout.tile))
    block_m = power(layout.tile * members)
    key_bytes = (main + rest + (0 if layout.latent else value_columns)) * layout.itemsize
    # Of heads of 512 columns that have values of their own (Gemma 4), two decode programs fit with 16 keys each.
    least = 16 if layout.itemsize == 4 or (layout.decode and not layout.latent) else 32
    # Prefill keeps widened keys and values in registers, beside the query tile's sums.
    widest = 64 if layout.codes and not layout.decode else 128
    block_n = max(least, min(widest, 1 << max(0, (TURN_BYTES // key_bytes).bit_length() - 1)))
    warps = 4 if layout.itemsize == 2 and block_m * value_columns <= 4096 else 8
    stages = 2 if layout.itemsize == 4 else 5 if layout.decode else 3
    return Tiling(members, block_m, block_n, main, rest, value_columns, Options(warps, stages))


def _split(layout: Layout) -> tuple[int, int]:
    """Split D into one power of two, or two if that has less padding: 576 = 512 + 64, not 1024."""
    whole = power(layout.dim)
    main = whole // 2
    rest = power(layout.dim - main) if main >= 16 else whole
    if main + rest >= whole or (layout.latent and layout.value_dim > main):
        return whole, 0
    return main, rest
