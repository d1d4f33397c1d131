"""A hybrid through `LLM`: samples and prefixes are shared, with and without sharing the tokens are the same, and a
result says what was found and why no more was."""

from collections.abc import Iterator

import pytest
from support import checkpoint
from support.tiny import HYBRIDS

from jaxinfer import LLM, EngineConfig, SamplingParams
from jaxinfer.engine.sizing.settings import HostSettings
from jaxinfer.kv.prefix_node import MatchEnd

pytestmark = [pytest.mark.xdist_group("hybrid faults"), pytest.mark.slow]

BLOCK, WINDOW = 4, HYBRIDS["alternating"]["sliding_window"]
SETTINGS = dict(
    max_model_len=128,
    max_num_seqs=8,
    max_num_batched_tokens=32,
    block_size=BLOCK,
    decode_buckets=(8,),
    prefill_buckets=(32,),
    kv_cache_memory_bytes=1 << 20,
    check_invariants=True,
    use_tqdm=False,
)
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def shared_llm(tmp_path_factory) -> Iterator[LLM]:
    folder = checkpoint.write(tmp_path_factory.mktemp("hybrid"), HYBRIDS["alternating"], scale=4.0)
    with LLM(folder, **SETTINGS) as made:
        yield made


def ids(length: int, seed: int = 0) -> list[int]:
    return [3 + (7 * seed + 5 * i * i + i) % 200 for i in range(length)]


def samples(llm: LLM) -> list[list[int]]:
    params = SamplingParams(n=16, temperature=0.5, seed=5, max_tokens=9, ignore_eos=True)
    [result] = llm.generate([ids(30)], params, use_tqdm=False)
    return [list(sample.token_ids) for sample in result.outputs]


def test_sharing_changes_no_token(llm, host):
    """Sixteen samples in eight rows; and prefixes, and beams."""

    def all_of_it() -> list[object]:
        prefixes = llm.generate([[*ids(25), 5 + i] for i in range(4)], GREEDY, use_tqdm=False)
        beams = llm.beam_search([ids(13)], 4, 9, use_tqdm=False)
        return [samples(llm), *([one.token_ids for one in r.outputs] for r in (*prefixes, *beams))]

    expected = all_of_it()
    assert len({tuple(sample) for sample in expected[0]}) > 4
    for settings in (
        dict(block_sharing=False),
        dict(prefix_caching=False),
        dict(block_sharing=False, prefix_caching=False),
    ):
        with host(**settings):
            assert all_of_it() == expected


def test_the_switches_reach_the_engine(llm):
    config = EngineConfig(enable_prefix_caching=False, enable_block_sharing=False, check_invariants=True)
    settings = HostSettings.of(config, llm._engine.runner)
    assert (settings.prefix_caching, settings.block_sharing, settings.check_invariants) == (False, False, True)
    settings = HostSettings.of(EngineConfig(), llm._engine.runner)
    assert (settings.prefix_caching, settings.block_sharing, settings.check_invariants) == (True, True, False)


def test_every_reason_is_told(llm, host):
    """What each kind of layer could have served, and why no more: in a pool of 60 blocks, of which a prompt of 61
    tokens and its last window take 16 in the full layers and 3 in the sliding ones."""
    told = {}

    def ask(prompt: list[int], **more: str):
        [result] = llm.generate({"prompt_token_ids": prompt, **more}, GREEDY, use_tqdm=False)
        metrics = result.metrics
        assert result.num_cached_tokens == metrics.cached_tokens <= min(hit.tokens for hit in metrics.cache_hits)
        assert [hit.kind for hit in metrics.cache_hits] == [f"sliding({WINDOW})", "full"]
        told.setdefault(metrics.cache_miss_reason, []).append(metrics)
        return metrics

    long = ids(61)
    with host(pool_blocks=60):
        assert ask([5, 6, 7]).cache_miss_reason == MatchEnd.NO_FULL_BLOCK
        assert ask(long).cache_miss_reason == MatchEnd.ABSENT
        assert ask(long, cache_salt="other").cache_miss_reason == MatchEnd.SALT
        assert (ask(long).cached_tokens, ask(long).cache_miss_reason) == (60, MatchEnd.COMPLETE)
        # What windows passed is what goes first when others come.
        ask(ids(30, 9))
        parted = ask([*long[: 8 * BLOCK], 3, 4, 5, 6, 7])
        assert parted.cache_miss_reason == MatchEnd.WINDOW and parted.cached_tokens < 8 * BLOCK
        assert [(hit.tokens, hit.reason) for hit in parted.cache_hits][1] == (8 * BLOCK, MatchEnd.ABSENT)
        for seed in range(1, 5):
            ask(ids(61, seed))
        gone = ask(long)
        assert (gone.cached_tokens, gone.cache_miss_reason) == (0, MatchEnd.EVICTED)
    assert set(told) == set(MatchEnd) - {MatchEnd.COLLISION}
