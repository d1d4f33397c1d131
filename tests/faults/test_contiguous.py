"""`LLM(cache="contiguous")`: its memory, what it refuses, and steps that fail."""

import jax
import pytest

from jaxinfer import SamplingParams
from jaxinfer.errors import CapacityError, ConfigError

pytestmark = pytest.mark.xdist_group("faults")

ROW_BYTES = 2 * 2 * 2 * 16 * 4 * 128
"""Of the tiny model: keys and values, layers, kv heads, head dim, float32, positions."""
PARAMS = SamplingParams(temperature=0, max_tokens=12)
MANY = SamplingParams(temperature=0.5, seed=3, n=3, max_tokens=12)
PROMPTS = [{"prompt_token_ids": [*range(5, 5 + length)]} for length in (3, 20, 41)]


@pytest.fixture(scope="module")
def contiguous(make_llm):
    """Eight rows of 128 positions, for all tests."""
    with make_llm(cache="contiguous") as llm:
        yield llm


def tokens(llm, params=PARAMS):
    return [[sample.token_ids for sample in output.outputs] for output in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.mark.slow
@pytest.mark.parametrize("params", [PARAMS, MANY])
def test_the_tokens_are_those_of_the_paged_cache(contiguous, llm, params):
    assert tokens(contiguous, params) == tokens(llm, params)
    assert contiguous._engine.manager.pool.num_held == 0


def test_nothing_is_found_again_and_it_says_why(contiguous):
    for _ in range(2):
        [output] = contiguous.generate(PROMPTS[1], PARAMS, use_tqdm=False)
        assert output.num_cached_tokens == 0
        assert [hit.reason for hit in output.metrics.cache_hits] == ["a contiguous cache has no prefix cache"]


def test_after_a_failed_step_all_goes_on(contiguous, monkeypatch):
    expected, engine = tokens(contiguous), contiguous._engine
    run, left = engine.runner.run, [4]

    def failing(*given):
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("device lost")
        return run(*given)

    monkeypatch.setattr(engine.runner, "run", failing)
    assert tokens(contiguous) == expected and left[0] < 0


def test_its_bytes_are_in_the_one_budget(contiguous, make_llm):
    shapes = contiguous._engine.runner.shapes
    assert (shapes.rows, shapes.width, shapes.num_blocks) == (8, 32, 8 * 32)
    assert sum(array.nbytes for array in jax.tree.leaves(contiguous._engine.runner.cache)) == 8 * ROW_BYTES
    with pytest.raises(
        CapacityError,
        match=r"511 KiB.*8 rows \(max_num_seqs\) of 124 positions.*128.*512 KiB; raise kv_cache_memory_bytes",
    ):
        make_llm(cache="contiguous", kv_cache_memory_bytes=8 * ROW_BYTES - 1024)
    with pytest.raises(CapacityError, match=r"100 B.*holds 8 rows \(max_num_seqs\) of 0 positions"):
        make_llm(cache="contiguous", kv_cache_memory_bytes=100, max_model_len=None)


@pytest.mark.parametrize(
    ("settings", "rows", "length"),
    [
        (dict(max_num_seqs=None, decode_buckets=None), 5, 128),
        (dict(max_model_len=None), 8, 80),
        (dict(max_model_len=None, max_num_seqs=None, decode_buckets=None), 2, 256),
    ],
)
def test_what_is_not_asked_for_is_fitted_to_the_memory(make_llm, caplog, settings, rows, length):
    with make_llm(cache="contiguous", kv_cache_memory_bytes=5 * ROW_BYTES, **settings) as llm:
        assert (llm._engine.runner.shapes.rows, llm._engine.runner.shapes.max_length) == (rows, length)
    assert ("as many tokens as each of 8 rows" in caplog.text) == (length == 80)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(cache="ring"), "cache must be 'paged' or 'contiguous', got 'ring'"),
        (dict(cache="contiguous", pool_blocks=9), "pool_blocks is 9, but cache='contiguous' has no block pool"),
        (dict(cache="contiguous", enable_prefix_caching=True), "enable_prefix_caching is True, but cache='contiguous'"),
    ],
)
def test_what_it_does_not_have_is_refused(make_llm, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_llm(**settings)
