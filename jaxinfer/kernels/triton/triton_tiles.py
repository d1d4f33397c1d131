"""The tiles of the attention kernel, chosen from shapes alone before compilation. By arithmetic; not measured yet."""

from dataclasses import dataclass

from jaxinfer.kernels.triton.triton_launch import Options

TURN_BYTES = 32 << 10
"""Of keys and values that one turn of a program's loop reads."""


@dataclass(frozen=True)
class Layout:
    """The shapes of one attention call that decide its tiles."""

    heads: int
    """H of this shard."""
    kv_heads: int
    dim: int
    value_dim: int
    latent: bool
    itemsize: int
    """Bytes of an element."""
    tile: int
    """Queries of one row in a program; 1 for decode."""
    decode: bool


@dataclass(frozen=True)
class Tiling:
    """How one program cuts its work. Chosen by arithmetic, not measured."""

    members: int
    """Query heads of a kv head in one program."""
    block_m: int
    """Rows of the query tile: queries x members, padded."""
    block_n: int
    """Keys a turn of the loop reads."""
    main: int
    """Columns of a key in the first product, a power of two."""
    rest: int
    """Those in a second one; 0: there is none."""
    value_columns: int
    """Dv padded to a power of two."""
    options: Options

    def parts(self, group: int) -> int:
        """Programs that share the G query heads of a kv head."""
        return -(-group // self.members)


def power(size: int, least: int = 16) -> int:
    """The next power of two: what an axis of a tile must be; a product's axes have 16 at least."""
    return max(least, 1 << (size - 1).bit_length())


def query_rows(value_dim: int, itemsize: int) -> int:
    """Rows of the largest query tile whose accumulator of `[rows, Dv]` float32 stays in registers.

    In 16 bits the tensor cores take 128 rows (two warp groups of an H100), until Dv is MLA's 512: 32. In float32 there
    are only ordinary multiplications, which hold both operands in registers: 16.
    """
    if itemsize == 4:
        return 16
    return 32 if value_dim > 256 else 128


def tile(group: int, value_dim: int, itemsize: int) -> int:
    """Queries of one prefill tile for `group` query heads a kv head: they fill the rows of the query tile."""
    return max(1, query_rows(value_dim, itemsize) // group)


def tiling(layout: Layout) -> Tiling:
    """The tiles for a layout, from its numbers alone.

    The pipeline keeps what two turns of the loop read in shared memory (an H100 has 227 KiB a multiprocessor): with the
    query tile that is at most half of it for decode. Five stages give decode
    two reads ahead, because the block table is a read of its own before them; prefill, whose products take longer
    than its reads, has one.
    """
    main, rest = _split(layout)
    value_columns = main if layout.latent else power(layout.value_dim)
    most = query_rows(layout.value_dim, layout.itemsize)
    # 64 rows of 16 bits fill a warp group; a decode tile of 128 gains nothing by being one program and not two.
    most = min(most, 64) if layout.decode else most
    members = min(layout.heads // layout.kv_heads, max(1, most // layout.tile))
    block_m = power(layout.tile * members)
    key_bytes = (main + rest + (0 if layout.latent else value_columns)) * layout.itemsize
    least = 16 if layout.itemsize == 4 else 32
    block_n = max(least, min(128, 1 << max(0, (TURN_BYTES // key_bytes).bit_length() - 1)))
    warps = 4 if layout.itemsize == 2 and block_m * value_columns <= 4096 else 8
    stages = 2 if layout.itemsize == 4 else 5 if layout.decode else 3
    return Tiling(members, block_m, block_n, main, rest, value_columns, Options(warps, stages))


def _split(layout: Layout) -> tuple[int, int]:
    """D as one power of two, or as two where that is less padding: 576 = 512 + 64, not 1024."""
    whole = power(layout.dim)
    main = whole // 2
    rest = power(layout.dim - main) if main >= 16 else whole
    if main + rest >= whole or (layout.latent and layout.value_dim > main):
        return whole, 0
    return main, rest
