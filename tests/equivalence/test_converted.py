"""A converted folder gives the same weights and tokens as its checkpoint, over the same or other devices."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support import checkpoint
from support.cases import EDGES
from support.tiny import CONFIG, config, prompt

from jaxinfer import LLM, SamplingParams
from jaxinfer.checkpoint.rules import parameters
from jaxinfer.loading import convert, weights
from jaxinfer.sharding import make_mesh

pytestmark = [pytest.mark.xdist_group("converted"), pytest.mark.slow]

HEADS = CONFIG | dict(architectures=["LlamaForCausalLM"], num_attention_heads=8)
"""Eight query heads and two kv heads, which are repeated over four devices."""
SETTINGS = dict(
    max_model_len=128,
    max_num_seqs=8,
    max_num_batched_tokens=32,
    block_size=4,
    decode_buckets=(8,),
    prefill_buckets=(32,),
    kv_cache_memory_bytes=1 << 20,
    decode_steps=1,
    use_tqdm=False,
    skip_tokenizer_init=True,
    dtype="float32",
)


def assert_same_weights(source: Path, converted: Path, tp: int, quantization: str | None) -> list[str]:
    """Check that both folders give the same parameters, bit for bit; return their paths."""

    def read(folder: Path) -> dict[str, np.ndarray]:
        made = weights.load(folder, make_mesh(tp), quantization=quantization, progress=False)
        return {path: np.asarray(param[...]) for path, param in parameters(made).items()}

    expected, found = read(source), read(converted)
    assert list(found) == list(expected)
    for path, values in expected.items():
        assert found[path].dtype == values.dtype
        np.testing.assert_array_equal(found[path], values, err_msg=path)
    return list(found)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The checkpoint, and its conversions for `tp` devices."""
    base = tmp_path_factory.mktemp("converted")
    source = checkpoint.write(base / "source", HEADS, with_tokenizer=False)

    @cache
    def converted(tp: int, quantization: str | None) -> Path:
        out = base / f"{tp}-{quantization}"
        convert.convert(source, out, make_mesh(tp), quantization=quantization, progress=False)
        return out

    return source, converted


@pytest.mark.parametrize(
    ("before", "tp", "quantization"),
    [(1, 1, None), (2, 1, None), (2, 2, None), (2, 4, None), (1, 1, "int8"), (2, 2, "int8"), (2, 4, "int8")],
)
def test_converted_is_original(folders, before, tp, quantization):
    assert_same_weights(folders[0], folders[1](before, quantization), tp, quantization)


def test_an_engine_runs_a_converted_folder_as_the_original(folders):
    """The folder says that its weights are int8; the original needs the setting."""

    def tokens(folder: Path, **settings: object) -> list[list[int]]:
        prompts = [prompt(length, i) for i, length in enumerate(EDGES)]
        with LLM(folder, tensor_parallel_size=4, **SETTINGS | settings) as llm:
            found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in found]

    assert tokens(folders[1](2, "int8")) == tokens(folders[0], quantization="int8")


@pytest.mark.parametrize(
    ("family", "quantization", "before", "tp"),
    [
        ("kimi_linear", None, 2, 2),
        ("kimi_linear", None, 2, 1),
        ("kimi_linear", None, 4, 2),
        ("kimi_linear", "int8", 4, 2),
        ("qwen3_next", None, 4, 2),
    ],
)
def test_the_weights_of_recurrent_layers_latents_and_experts_are_read_back(family, quantization, before, tp, tmp_path):
    """Fused projections and convolutions, decays in float32, stacks of experts."""
    heads = {"linear_num_key_heads": 4} if family == "qwen3_next" else {}
    source = checkpoint.write(tmp_path / "source", config(family) | heads, with_tokenizer=False)
    convert.convert(source, tmp_path / "out", make_mesh(before), quantization=quantization, progress=False)
    assert any("decay" in path for path in assert_same_weights(source, tmp_path / "out", tp, quantization))
