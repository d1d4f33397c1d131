"""The engine's steps compiled for H100s, with none present: the cache stays in place, layers have two all-reduces."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import pytest
from support.lowering import (
    MEDIUM,
    Compiled,
    abstract_model,
    compile_lowered,
    compile_step,
    h100_mesh,
    require_cuda_compiler,
)

from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.device_state import abstract_cache
from jaxinfer.engine.runner.logits import SampleLogits
from jaxinfer.engine.runner.lowering import lower
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.kernels.attention.mosaic_tiles import PROGRAMS
from jaxinfer.sharding.policy import REPLICATE, Placement

pytestmark = [pytest.mark.xdist_group("h100"), pytest.mark.usefixtures("cuda_compiler"), pytest.mark.slow]

ROWS, POSITIONS, BLOCK, CHUNK = 8, 1024, 16, 512
WIDTH = POSITIONS // BLOCK
REGISTERS, THREADS = 65536, 128
"""Registers of a multiprocessor; threads of a program of the Mosaic kernel."""
SHAPES = Shapes(
    # Twice what the rows can hold, so that what attention gathers is not mistaken for the cache.
    num_blocks=2 * ROWS * WIDTH,
    block_size=BLOCK,
    rows=ROWS,
    width=WIDTH,
    decode_buckets=(ROWS,),
    prefill_buckets=(CHUNK,),
    prefill_rows=ROWS,
    max_logprobs=5,
    max_length=POSITIONS,
    sampled_vocab=32000,
)


@pytest.fixture(scope="module")
def cuda_compiler() -> None:
    require_cuda_compiler()


@cache
def step(
    kind: str,
    layers: int,
    tp: int = 1,
    quantization: str | None = None,
    replicated: str | None = None,
    heads: int = 16,
    kv_heads: int = 4,
    contiguous: bool = False,
    kv_cache_dtype: str = "auto",
    attention_kernel: str = "triton",
) -> Compiled:
    """Compile a greedy step: its logits and their sampler."""
    hf = MEDIUM | dict(num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads)
    placement = Placement({replicated: REPLICATE} if replicated else {})
    program, params = abstract_model(
        hf,
        h100_mesh(tp),
        quantization=quantization,
        placement=placement,
        pad_heads=heads != 16,
        kv_cache_dtype=kv_cache_dtype,
        attention_kernel=attention_kernel,
    )
    tokens = ROWS if kind == "decode" else CHUNK
    assert program.kernel == attention_kernel
    decodes, kind = (ROWS, "prefill") if kind == "joint" else (0, kind)
    own = dict(tile=program.tile, contiguous=contiguous, decodes=decodes)
    bucket = Bucket(kind, tokens, ROWS, WIDTH, Level.GREEDY, -1, **own)
    return compile_step(program, params, replace(SHAPES, contiguous=contiguous), bucket)


@cache
def sampler(level: Level, logprobs: int = -1, tp: int = 1) -> Compiled:
    """Compile a sampler."""
    program, _ = abstract_model(MEDIUM | {"num_hidden_layers": 1}, h100_mesh(tp))
    key = SampleLogits(ROWS, level, logprobs)
    return compile_lowered(lower(key, program, SHAPES, [], None), abstract_cache(program, SHAPES))


WINDOWS = {
    "alternating": ["sliding_attention", "full_attention"] * 6,
    "five to one": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
}


@cache
def hybrid(kind: str, name: str, tp: int = 1, *, contiguous: bool = False) -> Compiled:
    """A step of 12 layers, some of which see a window of 256 positions."""
    kinds = WINDOWS[name]
    hf = MEDIUM | dict(
        architectures=["Qwen2ForCausalLM"],
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        sliding_window=256,
        use_sliding_window=True,
    )
    program, params = abstract_model(hf, h100_mesh(tp))
    groups = program.layout.groups
    shapes = replace(SHAPES, groups=groups, num_blocks=SHAPES.num_blocks * groups, contiguous=contiguous)
    tokens = ROWS if kind == "decode" else CHUNK
    own = {"groups": groups} if kind == "decode" else {"tile": program.tile}
    own["contiguous"] = contiguous
    return compile_step(program, params, shapes, Bucket(kind, tokens, ROWS, WIDTH, Level.GREEDY, -1, **own))


def check_in_place(compiled: Compiled) -> None:
    assert compiled.aliased_bytes >= compiled.cache_bytes
    assert compiled.large_copies == []


def check_command_buffers(compiled: Compiled) -> None:
    """Check that the logits are computed by one command buffer, and greedy tokens by 4 kernels.

    XLA makes no command buffer of fewer than five kernels. Whatever the number of layers, three kernels use addresses
    that differ from step to step: those that read the packed inputs, write logits, and return sampling parameters.
    """
    assert compiled.command_buffers == 1 and len(compiled.launched_alone) == len(compiled.sampler.kernels) == 4
    assert len(compiled.touching_new_addresses) == 3


def test_a_decode_step_of_16_layers_updates_the_cache_in_place_in_little_memory():
    compiled = step("decode", 16)
    check_in_place(compiled)
    assert compiled.temporary_bytes < 8 << 20
    assert compiled.collectives == Counter()


def test_a_decode_step_with_the_mosaic_kernel_is_one_command_buffer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    compiled = step("decode", 2, attention_kernel="mosaic")
    check_in_place(compiled)
    if jax.__version_info__ >= (0, 12):
        check_command_buffers(compiled)
    else:  # Mosaic kernels cannot be recorded yet
        assert compiled.launched_alone.count("kCustomCall") == 2
    [ptx], [assembler] = (
        [file.read_text("latin1") for file in tmp_path.glob(f"*.{kind}")] for kind in ("ptx", "ptxas")
    )
    assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx
    assert "0 bytes spill stores, 0 bytes spill loads" in assembler
    registers = int(re.search(r"Used (\d+) registers", assembler)[1])
    assert registers * THREADS * PROGRAMS <= REGISTERS


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_contiguous_cache_is_updated_in_place_with_no_kernel_more(kind: str):
    """Tables follow from the rows: what writes and reads them in a step over a paged cache falls away."""
    paged, contiguous = step(kind, 2), step(kind, 2, contiguous=True)
    check_in_place(contiguous)
    assert contiguous.cache_bytes == paged.cache_bytes
    assert contiguous.aliased_bytes < paged.aliased_bytes  # which has the tables of all rows in place as well
    check_command_buffers(contiguous)
    assert len(contiguous.kernels) <= len(paged.kernels)


def test_layers_of_a_contiguous_cache_that_share_arrays_update_them_in_place():
    compiled = hybrid("decode", "five to one", contiguous=True)
    check_in_place(compiled)
    check_command_buffers(compiled)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_quantised_cache_is_updated_in_place_with_4_kernels_a_layer_more(kind: str):
    """Maxima, scales and codes of keys and values, which are not concatenated with the queries."""
    exact, compiled, more = step(kind, 2), step(kind, 2, kv_cache_dtype="fp8"), step(kind, 3, kv_cache_dtype="fp8")
    check_in_place(compiled)
    check_command_buffers(compiled)
    assert compiled.cache_bytes * 128 == exact.cache_bytes * 66
    assert len(more.kernels) - len(compiled.kernels) <= len(step(kind, 3).kernels) - len(exact.kernels) + 4


# A layer of decode: GEMM of qkv, rope, attend, combine, GEMM, residual, norm, GEMM of gate and up, activation, GEMM,
# residual and norm. Prefill has no combine, and its second residual is apart. Beside the layers the inputs, angles, the
# work items, the embedding, the head and the sampler.
@pytest.mark.parametrize(("kind", "layers"), [("decode", 16), ("prefill", 2)])
def test_a_step_is_one_command_buffer_of_11_kernels_a_layer(kind: str, layers: int):
    compiled = step(kind, layers)
    check_command_buffers(compiled)
    names = Counter(compiled.kernels)
    assert names["attend"] == layers and names["combine"] == (layers if kind == "decode" else 0)
    assert len(compiled.kernels) <= 11 * layers + 18


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("decode", "alternating"),
        ("decode", "five to one"),
        ("prefill", "alternating"),
        ("prefill", "five to one"),
    ],
)
def test_layers_that_share_arrays_update_them_in_place(kind: str, name: str):
    """12 layers on 6 cache arrays in 2 groups, or on 2 in 6: each kind takes work items from its own tables."""
    compiled = hybrid(kind, name)
    check_in_place(compiled)
    assert compiled.temporary_bytes < (8 << 20 if kind == "decode" else 32 << 20)
    check_command_buffers(compiled)
    groups = 2 if name == "alternating" else 6
    assert len(compiled.kernels) <= 11 * 12 + 16 + 5 * groups


def test_a_joint_step_reads_its_weights_once_and_has_4_kernels_a_layer_more_than_a_prefill():
    """Of the decodes: their part of q, k and v, attend, combine, and their outputs among those of the chunks."""
    two, three, apart = step("joint", 2), step("joint", 3), (step("prefill", 2), step("decode", 2))
    check_in_place(two)
    check_command_buffers(two)
    names = Counter(two.kernels)
    assert names["attend"] == 4 and names["combine"] == 2
    more = [len(step(kind, 3).kernels) - len(step(kind, 2).kernels) for kind in ("prefill", "decode")]
    assert len(three.kernels) - len(two.kernels) <= more[0] + 4 < sum(more)
    weights = 2 * (2 * 1024 * (1024 + 2 * 256 + 1024 + 3 * 2816) + 1024 * 32000)
    assert two.moved_bytes < sum(one.moved_bytes for one in apart) - 0.9 * weights
    assert two.temporary_bytes < apart[0].temporary_bytes + (2 << 20)


def test_layers_that_share_arrays_do_so_on_several_devices():
    compiled = hybrid("decode", "five to one", 4)
    check_in_place(compiled)
    assert compiled.collectives == Counter({"all-reduce": 2 * 12 + 1, "all-gather": 1})


def test_a_decode_step_moves_its_weights_and_10_percent_more():
    """The attention kernel apart."""
    weights = 16 * 1024 * (1024 + 2 * 256 + 1024 + 3 * 2816) + 1024 * 32000
    assert step("decode", 16).moved_bytes < 1.1 * 2 * weights


def test_all_but_collectives_lies_in_command_buffers_on_several_devices():
    two, three = (Counter(step("decode", layers, 4).launched_alone) for layers in (2, 3))
    assert three["kAllReduce"] - two["kAllReduce"] == 2
    # The third layer adds nothing else, whatever XLA calls what it launches beside the layers.
    assert three.total() - two.total() == 2
    assert step("decode", 3, 4).kernels.count("attend") == 3


def test_a_prefill_step_updates_the_cache_in_place():
    compiled = step("prefill", 2)
    check_in_place(compiled)
    assert compiled.temporary_bytes < 32 << 20
    assert compiled.collectives == Counter()


def test_a_sampler_of_every_setting_updates_histories_in_place():
    histories, biases = 4 * ROWS * POSITIONS, 4 * ROWS * SHAPES.sampled_vocab
    assert sampler(Level.EDITED, 5).aliased_bytes >= histories + biases


# A greedy sampler has 4 kernels, the race 4 more, each of the two searches 24, penalties and biases 11;
# log-probabilities have 8, or 15 where 20 take XLA's kernel for at most 16 twice.
@pytest.mark.parametrize(
    ("level", "logprobs", "kernels"),
    [
        (Level.GREEDY, -1, 4),
        (Level.GREEDY, 20, 20),
        (Level.RANDOM, -1, 11),
        (Level.RANDOM, 1, 19),
        (Level.RANDOM, 20, 26),
        (Level.TRUNCATED, 1, 75),
        (Level.EDITED, 20, 95),
    ],
)
def test_no_sampler_sorts_or_loops(level: Level, logprobs: int, kernels: int):
    compiled = sampler(level, logprobs)
    text = compiled.executable.as_text()
    assert " sort(" not in text and " while(" not in text
    assert compiled.command_buffers == (kernels > 4) and not (kernels > 4 and compiled.launched_alone)
    assert len(compiled.kernels) <= kernels


def test_a_random_token_is_drawn_where_its_logits_lie():
    """Each device finds the winner among its part of the vocabulary; thresholds are searched for by sums over all
    parts."""
    greedy, random, truncated = (sampler(level, tp=4).collectives for level in list(Level)[:3])
    assert greedy == Counter({"all-gather": 1})
    assert random - greedy == Counter({"all-reduce": 1})
    assert set(truncated) == {"all-reduce", "all-gather"}


@pytest.mark.parametrize(
    ("kind", "tp", "quantization"),
    [("decode", 4, None), ("decode", 8, None), ("prefill", 8, None), ("decode", 8, "int8"), ("prefill", 8, "int8")],
)
def test_a_layer_has_two_all_reduces_and_nothing_else(kind: str, tp: int, quantization: str | None):
    compiled = step(kind, 3, tp, quantization=quantization)
    check_in_place(compiled)
    # Beside the layers: the embedding's rows are added up, and each shard's best token is compared.
    assert compiled.collectives == Counter({"all-reduce": 3 * 2 + 1, "all-gather": 1})


# A replicated cache array is whole on every device: four times the bytes of a divided one.
@pytest.mark.parametrize(
    ("kind", "replicated", "reduces", "share"),
    [
        ("decode", "*.attention", 1, 1),
        ("prefill", "*.attention", 1, 1),
        ("decode", "*.mlp", 1, 1 / 4),
        ("decode", "layers.*", 0, 1),
    ],
)
def test_a_replicated_module_has_no_collective_and_its_cache_stays_in_place(
    kind: str, replicated: str, reduces: int, share: float
):
    compiled = step(kind, 3, 4, replicated=replicated)
    check_in_place(compiled)
    assert compiled.collectives == Counter({"all-reduce": 3 * reduces + 1, "all-gather": 1})
    assert compiled.cache_bytes == 3 * SHAPES.num_blocks * 2 * 4 * BLOCK * 64 * 2 * share


def test_a_step_with_everything_replicated_has_no_collective():
    compiled = step("decode", 2, 4, replicated="*")
    check_in_place(compiled)
    assert compiled.collectives == Counter()


def test_heads_of_zeroes_add_no_collective_and_no_copy():
    """14 heads around 2 over eight devices, two a device."""
    compiled = step("decode", 3, 8, heads=14, kv_heads=2)
    check_in_place(compiled)
    assert compiled.collectives == step("decode", 3, 8).collectives
