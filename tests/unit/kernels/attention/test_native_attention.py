"""Native attention against the reference: several iterations over keys, wide heads, rows with NaN."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support.attention import CHUNKS, PLAIN, SHAPES, Case, same_cache
from support.native import require_native_kernels

from jaxinfer.kernels.attention import native_attention
from jaxinfer.kernels.attention.paged import KVCache
from jaxinfer.kernels.attention.xla_attention import TILE

P = PLAIN.block
WIDE = {
    "Llama": replace(PLAIN, heads=8, kv_heads=2, dim=64, block=16, dtype="bfloat16"),
    "no multiple of a register": replace(PLAIN, heads=5, kv_heads=1, dim=72, value_dim=40, block=8),
    "latent of MLA": replace(PLAIN, heads=4, kv_heads=1, dim=144, value_dim=128, latent=True, block=16),
    "long window": replace(PLAIN, window=150, sinks=True, block=16),
    "long chunks": replace(PLAIN, window=150, chunked=True, block=16),
    "Llama, int8 codes": replace(PLAIN, heads=8, kv_heads=2, dim=64, block=16, dtype="bfloat16", codes="int8"),
    "fp8 codes, no multiple of a register": replace(PLAIN, heads=5, kv_heads=1, dim=72, value_dim=40, codes="fp8"),
    "latent of MLA, int8 codes": replace(
        PLAIN, heads=4, kv_heads=1, dim=144, value_dim=128, latent=True, block=16, dtype="bfloat16", codes="int8"
    ),
}
SHAPES = SHAPES | WIDE


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    require_native_kernels()


def decode(case: Case, padding: int) -> tuple[jax.Array, KVCache, np.ndarray, KVCache]:
    q, k, v, rows, positions = case.step(padding)
    run = jax.jit(lambda *args: native_attention.decode(*args, case.shape.scoring, case.sinks))
    found = run(q, k, v, case.kv_cache, case.slots(rows, positions), case.decode_rows(padding))
    return *found, *case.expected(q, k, v, rows, positions)


@pytest.mark.parametrize("name", SHAPES)
def test_decode_equals_the_reference(name: str):
    """Lengths around block and iteration boundaries, and padding rows whose tables hold arbitrary ids."""
    lengths = [1, P - 1, P, P + 1, 2 * P + 1, 127, 128, 129, 300]
    case = Case(SHAPES[name], lengths, [1] * len(lengths))
    found, kv_cache, expected, expected_cache = decode(case, 2)
    case.close(found, expected)
    same_cache(kv_cache, expected_cache, case.shape.wide)
    assert not np.asarray(found[-2:], np.float32).any(), "padding gives 0"


@pytest.mark.parametrize(
    ("chunks", "name"), [(name, "plain") for name in CHUNKS] + [("several", name) for name in SHAPES]
)
def test_prefill_equals_the_reference(chunks: str, name: str):
    """Chunks of several sequences beside padding tokens, after 0 to 200 cached positions."""
    sizes = [count for _, count in CHUNKS[chunks]]
    starts = [start + (200 if name in WIDE else 0) for start, _ in CHUNKS[chunks]]
    case = Case(SHAPES[name], [start + count for start, count in zip(starts, sizes, strict=True)], sizes)
    q, k, v, rows, positions = case.step(padding=5)
    run = jax.jit(lambda *args: native_attention.prefill(*args, case.shape.scoring, case.sinks, tile=TILE))
    found, kv_cache = run(q, k, v, case.kv_cache, case.slots(rows, positions), case.prefill_tiles(TILE, padding=5))
    expected, expected_cache = case.expected(q, k, v, rows, positions)
    case.close(found[:-5], expected[:-5])
    same_cache(kv_cache, expected_cache, case.shape.wide)
    assert np.isfinite(np.asarray(found, np.float32)).all(), "padding must be finite"


def test_the_bits_of_a_query_do_not_depend_on_its_tile():
    """A window begins at another position for every tile; keys are added up in the same pieces all the same."""
    shape = WIDE["long window"]
    case = Case(shape, [400], [40])
    q, k, v, rows, positions = case.step()
    run = jax.jit(lambda *args: native_attention.prefill(*args, shape.scoring, case.sinks, tile=TILE))
    expected, kv_cache = run(q, k, v, case.kv_cache, case.slots(rows, positions), case.prefill_tiles(TILE))
    for count in (1, 7, 25):
        part = Case(shape, [400], [count])
        part.tables = case.tables
        slots = part.slots(rows[-count:], positions[-count:])
        found, _ = run(q[-count:], k[-count:], v[-count:], kv_cache, slots, part.prefill_tiles(TILE))
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected[-count:]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["keys", "values", "key_scales", "value_scales"])
def test_nan_stays_in_its_sequence(where: str, dtype: str):
    """A NaN of a quantised position is in its scale."""
    codes = "int8" if where.endswith("scales") else None
    case = Case(replace(PLAIN, dtype=dtype, codes=codes), [5, 140, 9], [1, 1, 1])
    q, k, v, rows, positions = case.step()
    run = jax.jit(lambda *args: native_attention.decode(*args, case.shape.scoring))
    arguments = case.slots(rows, positions), case.decode_rows()
    whole, _ = run(q, k, v, case.kv_cache, *arguments)
    broken = getattr(case.kv_cache, where).at[case.tables[1, 2]].set(jnp.nan)
    found, _ = run(q, k, v, case.kv_cache._replace(**{where: broken}), *arguments)
    assert np.isnan(np.asarray(found[1], np.float32)).all()
    np.testing.assert_array_equal(np.asarray(found, np.float32)[[0, 2]], np.asarray(whole, np.float32)[[0, 2]])


@pytest.mark.parametrize("codes", [None, "fp8"])
def test_the_cache_is_written_in_place(codes: str | None):
    case = Case(replace(PLAIN, codes=codes), [5, 9], [1, 1])
    q, k, v, rows, positions = case.step()
    run = jax.jit(lambda *args: native_attention.decode(*args, case.shape.scoring), donate_argnums=3)
    made = jax.tree.map(jnp.copy, case.kv_cache)  # arrays made from NumPy cannot be donated
    addresses = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(made)]
    _, kv_cache = run(q, k, v, made, case.slots(rows, positions), case.decode_rows())
    assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves(kv_cache)] == addresses


@pytest.mark.parametrize("codes", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_code_is_multiplied_as_its_value(codes: str, dtype: str):
    """With one key, the output is its value: 256 columns with all codes but NaN."""
    case = Case(replace(PLAIN, heads=1, kv_heads=1, dim=256, dtype=dtype, codes=codes), [1], [1])
    every = np.arange(256, dtype=np.uint8)
    every[[0x7F, 0xFF]] = 0
    expected = every.view(np.int8 if codes == "int8" else ml_dtypes.float8_e4m3fn).astype(np.float32) / 2
    every = every.view(case.kv_cache.keys.dtype)
    values = case.kv_cache.values.at[case.tables[0, 0], 0, 0].set(every)
    scales = case.kv_cache.value_scales.at[case.tables[0, 0], 0, 0].set(0.5)
    keys = case.kv_cache.key_scales.at[case.tables[0, 0], 0, 0].set(1)
    kv_cache = case.kv_cache._replace(values=values, value_scales=scales, key_scales=keys)
    q, *_ = case.step()
    step = case.decode_rows()._replace(starts=jnp.array([0]))
    found, _ = native_attention.decode(q, None, None, kv_cache, None, step, case.shape.scoring)
    np.testing.assert_array_equal(np.asarray(found[0, 0], np.float32), expected)


def test_unsupported_cases_fall_back_to_xla():
    case = Case(replace(PLAIN, dtype="float16"), [5, 9], [1, 1])
    found, _, expected, _ = decode(case, 0)
    case.close(found, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_blocks_are_copied_in_place(dtype: str):
    blocks = np.arange(6 * 2 * P * 8).reshape(6, 2, P, 8).astype(jnp.dtype(dtype))
    sources, targets = np.array([1, 4, 0, 0], np.int32), np.array([2, 5, 6, 9], np.int32)
    run = jax.jit(native_attention.copy_blocks, donate_argnums=0)
    given = jnp.copy(blocks)
    address = given.unsafe_buffer_pointer()
    found = run(given, sources, targets)
    expected = blocks.copy()
    expected[[2, 5]] = blocks[[1, 4]]
    np.testing.assert_array_equal(np.asarray(found), expected)
    assert found.unsafe_buffer_pointer() == address
