"""The same on the CPU: the steps the tests run, and the arrays of a running engine."""

from dataclasses import replace

import jax
import pytest
from support.lowering import Compiled, abstract_model, compile_step
from support.tiny import (
    BLOCK,
    CHUNK,
    LENGTH,
    ROWS,
    config,
    make_engine,
    make_request,
    prompt,
    random_runner,
    shapes_of,
)

from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.kernels.native import build
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh

SLOTS = 1000
"""State slots, more than a step reads."""

pytestmark = [pytest.mark.xdist_group("llama"), pytest.mark.slow]


def step(
    kind: str, level: Level, dtype: str = "float32", *, contiguous: bool = False, family: str = "llama"
) -> Compiled:
    program, params = abstract_model(config(family) | {"dtype": dtype}, make_mesh())
    # More than a step gathers; of a contiguous cache four times as much for each row as the step reads.
    wide = shapes_of(program, num_blocks=4 * ROWS * LENGTH // BLOCK, contiguous=contiguous)
    if program.layout.states:
        wide = replace(wide, state_slots=SLOTS)
    tokens = ROWS if kind == "decode" else CHUNK
    own = {"contiguous": contiguous, "states": bool(program.layout.states)}
    bucket = Bucket(kind, tokens, ROWS, LENGTH // BLOCK, level, -1, **own)
    return compile_step(program, params, wide, bucket)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("level", [Level.GREEDY, Level.EDITED])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_the_program_updates_the_cache_in_place(kind: str, level: Level, contiguous: bool):
    compiled = step(kind, level, contiguous=contiguous)
    assert compiled.aliased_bytes >= compiled.cache_bytes
    assert compiled.large_copies == []


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_layers_see_arrays_in_other_shapes_without_a_copy(kind: str):
    compiled = step(kind, Level.GREEDY, family="gemma4")
    assert compiled.aliased_bytes >= compiled.cache_bytes
    assert compiled.large_copies == []


@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "kimi_linear", "qwen3_next", "lfm2"])
def test_a_decode_step_updates_recurrent_states_in_place(family: str):
    compiled = step("decode", Level.GREEDY, family=family)
    assert compiled.aliased_bytes >= compiled.cache_bytes
    assert compiled.large_copies == []


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11) and build.lacking() is not None,
    reason="without the native kernels this jax converts a bfloat16 cache to float32 and back on a CPU",
)
def test_a_bfloat16_cache_is_not_converted():
    assert step("decode", Level.GREEDY, "bfloat16").large_copies == []


def test_a_running_engine_keeps_the_memory_of_its_cache():
    runner = random_runner("llama")
    engine = make_engine(runner)
    addresses = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(runner.cache)]
    first = jax.tree.leaves(runner.cache)
    for i, length in enumerate((3, 21, 40)):
        engine.add(make_request(str(i), prompt(length, i), SamplingParams(temperature=0, max_tokens=6)))
    while engine.has_work:
        engine.step()
    assert all(array.is_deleted() for array in first)
    assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves(runner.cache)] == addresses
