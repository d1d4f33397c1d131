"""GrowingCache: appending one or several tokens, growth through all read lengths, and no copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cases import GREEDY, alone
from support.lowering import large_copies
from support.tiny import CONFIG, HYBRIDS, config, make_request, prompt, random_runner

from jaxinfer.errors import CacheConsumedError, CapacityError, ConfigError
from jaxinfer.functional import prefill_batch, split
from jaxinfer.functional.growing import GrowingCache, _one, _several
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.xdist_group("llama")

LONG = CONFIG | dict(architectures=["LlamaForCausalLM"], max_position_embeddings=1024)


@pytest.fixture(scope="module")
def model():
    """With XLA's attention, which reads as much as it is compiled for."""
    mesh = make_mesh(1)
    return split(weights.random(LONG, mesh), mesh, attention_kernel="xla")


def greedy(cache, params, tokens, count):
    """The next `count` tokens of each row, and the cache."""
    made = []
    logits, cache = cache.append(params, tokens)
    for _ in range(count):
        made.append(np.asarray(logits.argmax(axis=-1)))
        logits, cache = cache.append(params, made[-1][:, None])
    return np.stack(made, axis=1).tolist(), cache


def test_growing_cache_equals_the_engine():
    runner = random_runner()
    wanted = [make_request(str(i), prompt(length, i), GREEDY) for i, length in enumerate((5, 19))]
    cache = GrowingCache.reserve(runner.program, rows=2, capacity=60, step=8)
    made, cache = greedy(cache, runner.params, [r.prompt for r in wanted], GREEDY.max_tokens)
    assert [[row] for row in made] == alone(runner, wanted)
    assert cache.lengths == (5 + 10, 19 + 10) and cache.capacity == 64


@pytest.mark.slow
def test_appending_several_tokens_equals_one_at_a_time(model):
    program, params = model
    text = prompt(40, 3)
    whole, one = GrowingCache.reserve(program, 1, 64, 8).append(params, [text])
    cache = GrowingCache.reserve(program, 1, 64, 8)
    for start, stop in ((0, 7), (7, 8), (8, 30), (30, 31), (31, 40)):
        logits, cache = cache.append(params, [text[start:stop]])
    np.testing.assert_allclose(logits, whole, atol=1e-5)
    for layer in range(2):
        for a, b in zip(cache.layer(layer), one.layer(layer), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_it_grows_through_several_read_lengths_in_place(model):
    """With one long and one short row; each read length is compiled once and gives the same results as the longest."""
    program, params = model
    before, addresses = _one._cache_size(), None
    cache = GrowingCache.reserve(program, rows=2, capacity=520, step=64)
    texts = [prompt(120, 1), prompt(3, 2)]
    _, cache = cache.append(params, texts)
    made = []
    for _ in range(300):
        logits, cache = cache.append(params, [[5], [7]])
        made.append(np.asarray(logits))
        found = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(cache.arrays)]
        assert addresses in (None, found), "the cache was copied"
        addresses = found
    assert cache.lengths == (420, 303) and cache.regions.width == 9
    assert _one._cache_size() - before == 3, "128, 256 and 512 positions"
    whole = GrowingCache.reserve(program, rows=2, capacity=520, step=64)
    logits, _ = whole.append(params, [texts[0] + [5] * 300, texts[1] + [7] * 300])
    np.testing.assert_allclose(made[-1], logits, atol=1e-4)


@pytest.mark.parametrize(("name", "tp"), [("alternating", 1), ("five to one", 1), ("gemma4", 2)])
@pytest.mark.slow
def test_windows_are_masked(name, tp):
    """In Gemma 4 with layers that lie side by side, and some that attend to another one's keys."""
    mesh, hf = make_mesh(tp), CONFIG | HYBRIDS[name] if name in HYBRIDS else config(name)
    program, params = split(weights.random(hf, mesh), mesh)
    text = prompt(50, 3)
    whole, _ = GrowingCache.reserve(program, 1, 64, 8).append(params, [text])
    logits, cache = GrowingCache.reserve(program, 1, 64, 8).append(params, [text[:20]])
    for token in text[20:]:
        logits, cache = cache.append(params, [[token]])
    np.testing.assert_allclose(logits, whole, atol=1e-5)
    adopted = GrowingCache.adopt(program, [cache.layer(i) for i in range(len(program.specs))], capacity=80, step=16)
    ours, theirs = adopted.append(params, [[5]])[0], cache.append(params, [[5]])[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.slow
def test_another_cache_is_adopted(model):
    """Arrays `[R, K, S, D]` with arbitrary values beyond a row's length; they stay the caller's."""
    program, params = model
    texts = [prompt(21, 1), prompt(9, 2)]
    _, cache = GrowingCache.reserve(program, 2, 64, 8).append(params, texts)
    layers = []
    for number in range(2):
        keys, values = cache.layer(number)
        assert keys.shape == (2, 2, 21, 16)
        layers.append((keys.at[1, :, 9:].set(jnp.nan), np.array(values)))
    adopted = GrowingCache.adopt(program, layers, capacity=200, step=16, lengths=(21, 9))
    assert adopted.capacity == 208 and adopted.lengths == (21, 9)
    expected, _ = cache.append(params, [[4], [6]])
    found, adopted = adopted.append(params, [[4], [6]])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert adopted.lengths == (22, 10) and np.isfinite(layers[0][0][0]).all()


def test_a_consumed_cache_raises(model):
    program, params = model
    cache = GrowingCache.reserve(program, 1, 64, 8)
    _, cache = cache.append(params, [prompt(12)])
    kept = cache.copy()
    expected, after = cache.append(params, [[5]])
    for use in (lambda: cache.append(params, [[5]]), lambda: cache.layer(0), cache.copy):
        with pytest.raises(CacheConsumedError, match="of 12 positions was consumed by append.*copy"):
            use()
    np.testing.assert_array_equal(kept.append(params, [[5]])[0], expected)
    assert after.lengths == (13,)


def test_nbytes_is_the_reserved_memory(model):
    program, params = model
    cache = GrowingCache.reserve(program, rows=3, capacity=65, step=32)
    assert cache.nbytes == 3 * 96 * 2 * 2 * 2 * 16 * 4  # rows, positions, layers, keys and values, heads, dim, float32
    _, cache = cache.append(params, [[1, 2], [3], [4]])
    assert cache.nbytes == 3 * 96 * 2 * 2 * 2 * 16 * 4


@pytest.mark.parametrize("step", [_one, _several])
def test_the_compiled_steps_copy_no_cache(model, step):
    program, params = model
    cache = GrowingCache.reserve(program, rows=2, capacity=2048, step=64)
    batch = prefill_batch([(prompt(8), 0, 8)] * 2, np.zeros((2, 0), np.int32), tokens=16, tile=program.tile)
    ints = jax.ShapeDtypeStruct((2,), np.int32)
    sizes, inputs = ((cache.regions, 2), (ints, ints)) if step is _one else ((cache.regions,), (batch,))
    compiled = step.lower(program, *sizes, params, cache.arrays, *inputs).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == cache.nbytes
    assert large_copies(compiled.as_text(), cache.arrays[0].keys.size) == []


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(rows=0), "rows must be a positive integer, got 0"),
        (dict(capacity=-1), "capacity must be a positive integer, got -1"),
        (dict(step=True), "step must be a positive integer, got True"),
    ],
)
def test_invalid_sizes_are_refused(model, sizes, message):
    with pytest.raises(ConfigError, match=message):
        GrowingCache.reserve(model[0], **sizes)


def test_appending_and_adopting_check_sizes(model):
    program, params = model
    cache = GrowingCache.reserve(program, 2, 16, 8)
    with pytest.raises(CapacityError, match="row 1 would have 17 positions, but its capacity is 16.*capacity=17"):
        cache.append(params, [[1], prompt(17)])
    with pytest.raises(ValueError, match=r"one or more ids for each of 2 rows, got \[1\]"):
        cache.append(params, [[1]])
    with pytest.raises(ValueError, match=r"one or more ids for each of 2 rows, got \[1, 0\]"):
        cache.append(params, [[1], []])
    cache.append(params, [[1], [2]])  # nothing was consumed
    layer = np.zeros((1, 2, 20, 16), np.float32), np.zeros((1, 2, 20, 16), np.float32)
    with pytest.raises(CapacityError, match="row 0 would have 20 positions, but its capacity is 16"):
        GrowingCache.adopt(program, [layer] * 2, capacity=16, step=8)
    with pytest.raises(ConfigError, match="layers has 3 entries, but the model has 2"):
        GrowingCache.adopt(program, [layer] * 3)
    with pytest.raises(
        ConfigError, match=r"values of layer 1 have shape \(1, 2, 20, 15\); expected .* \(1, 2, 20, 16\)"
    ):
        GrowingCache.adopt(program, [layer, (layer[0], layer[1][..., 1:])])
    with pytest.raises(ConfigError, match=r"lengths must be 1 integers in \[0, 20\], got \(21,\)"):
        GrowingCache.adopt(program, [layer] * 2, lengths=(21,))
