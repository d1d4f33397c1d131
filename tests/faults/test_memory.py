"""Too little memory, said with the sizes and the setting to change."""

import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.engine.sizing import setup
from jaxinfer.errors import CapacityError, ConfigError

pytestmark = pytest.mark.xdist_group("faults")

BLOCK_BYTES = 2 * 2 * 2 * 4 * 16 * 4
"""Of the tiny model: keys and values, layers, kv heads, positions, head dim, float32."""


def test_a_pool_of_less_than_a_block(make_llm):
    with pytest.raises(CapacityError, match=r"100 B.*one block of 2 KiB.*raise kv_cache_memory_bytes"):
        make_llm(kv_cache_memory_bytes=100)


def test_a_pool_too_small_for_the_length_asked_for(make_llm):
    with pytest.raises(CapacityError, match=r"6 KiB.*12 tokens.*max_model_len = 128.*64 KiB.*kv_cache_memory_bytes"):
        make_llm(kv_cache_memory_bytes=3 * BLOCK_BYTES)


def test_without_a_length_asked_for_the_pool_sets_it(make_llm, caplog):
    with make_llm(kv_cache_memory_bytes=3 * BLOCK_BYTES, max_model_len=None) as llm:
        assert llm._input_processor.limits.max_model_len == 12
        [handle] = llm._prepare([[5, 6]], SamplingParams(max_tokens=20))
        llm._engine.add(handle.request)
        assert handle.output().metrics.clamped_max_tokens == 10 and "max_tokens lowered to 10 from 20" in caplog.text
    assert "max_model_len is 12" in caplog.text


def test_a_pool_larger_than_the_machine(make_llm):
    with pytest.raises(CapacityError, match="more than this machine's memory"):
        make_llm(kv_cache_memory_bytes=1 << 49)


def test_out_of_memory_at_start(make_llm, monkeypatch):
    def full(*_args, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 42 bytes")

    monkeypatch.setattr(setup, "Runner", full)
    with pytest.raises(CapacityError, match=r"256 blocks \(512 KiB\).*lower kv_cache_memory_bytes or gpu_memory"):
        make_llm()


def test_another_failure_at_start_is_not_called_memory(make_llm, monkeypatch):
    def broken(*_args, **options):
        raise RuntimeError("INTERNAL: something else")

    monkeypatch.setattr(setup, "Runner", broken)
    with pytest.raises(RuntimeError, match="something else"):
        make_llm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_num_batched_tokens=4), "max_num_batched_tokens is 4, less than max_num_seqs = 8"),
        (dict(max_model_len=1000), "max_model_len is 1000.*256"),
        (dict(prefill_buckets=(16,)), "prefill_buckets ends at 16.*32"),
        (dict(decode_buckets=(4,)), "decode_buckets ends at 4.*8"),
        (dict(block_size=0), r"block_size must be in \[1, 1024\], got 0"),
        (dict(max_num_seqs=True), "max_num_seqs must be an integer"),
        (dict(kv_cache_memory_bytes=-1), "kv_cache_memory_bytes"),
        (dict(gpu_memory_utilization=1.5), "gpu_memory_utilization"),
        (dict(dtype="int8"), "dtype"),
        (dict(tensor_parallel_size=9), "tensor_parallel_size is 9.*8 device"),
        (dict(tensor_parallel_size=3), "3"),
    ],
)
def test_settings_that_cannot_be(make_llm, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_llm(**settings)


def test_the_figures_are_logged(folder, caplog):
    with caplog.at_level("INFO", "jaxinfer"):
        LLM(folder, max_model_len=64, max_num_seqs=2, use_tqdm=False).close()
    assert "8 blocks of 16 tokens" in caplog.text and "1 GiB" in caplog.text
