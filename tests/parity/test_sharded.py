"""`LLM` over a folder, on one device and on several, gives the greedy tokens of transformers."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from support.tiny import BLOCK, CHUNK, LENGTH, prompt

pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

from support import reference as ref

from jaxinfer import LLM, SamplingParams

PROMPTS = [prompt(length, seed) for seed, length in enumerate((3, 17, 40))]
COUNT = 64
SETTINGS = dict(
    dtype="float32",
    max_num_seqs=4,
    max_num_batched_tokens=CHUNK,
    prefill_buckets=(CHUNK,),
    decode_buckets=(4,),
    block_size=BLOCK,
    max_model_len=LENGTH,
    kv_cache_memory_bytes=2**21,
    check_invariants=True,
)


@cache
def model(family: str) -> ref.Model:
    return ref.model(family)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: ref.save(model(family), tmp_path_factory.mktemp("checkpoint")))


CASES = [
    pytest.param("llama", 1, marks=pytest.mark.xdist_group("llama")),
    pytest.param("llama", 2, marks=pytest.mark.xdist_group("llama")),
    # More shards than the two kv heads: each head serves two shards.
    pytest.param("qwen3", 4, marks=pytest.mark.xdist_group("qwen3")),
    pytest.param("gpt_oss", 2, marks=pytest.mark.xdist_group("gpt_oss")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tp"), CASES)
def test_greedy_tokens_of_a_folder_equal_transformers(family, tp, folder):
    with LLM(folder(family), skip_tokenizer_init=True, tensor_parallel_size=tp, use_tqdm=False, **SETTINGS) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in PROMPTS],
            SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True),
            use_tqdm=False,
        )
    assert [list(o.outputs[0].token_ids) for o in outputs] == [ref.greedy(model(family), ids, COUNT) for ids in PROMPTS]
