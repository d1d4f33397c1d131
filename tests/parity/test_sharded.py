"""`LLM` over a folder, on more devices than the model has kv heads, gives the greedy tokens of transformers.

Every family is compared with transformers on one device in `test_parity`, and over several devices with one device in
`tests/equivalence/test_sharded.py`.
"""

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


@pytest.mark.slow
@pytest.mark.xdist_group("qwen3")
def test_greedy_tokens_of_a_folder_equal_transformers(tmp_path):
    """On four devices each of the two kv heads serves two shards."""
    model = ref.model("qwen3")
    folder = ref.save(model, tmp_path)
    with LLM(folder, skip_tokenizer_init=True, tensor_parallel_size=4, use_tqdm=False, **SETTINGS) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in PROMPTS],
            SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True),
            use_tqdm=False,
        )
    assert [list(o.outputs[0].token_ids) for o in outputs] == [ref.greedy(model, ids, COUNT) for ids in PROMPTS]
