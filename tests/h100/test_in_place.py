"""The same on the CPU: the steps the tests run, and the arrays of a running engine."""

import jax
import pytest
from support.lowering import compile_step
from support.tiny import BLOCK, CHUNK, LENGTH, ROWS, make_engine, make_request, prompt, random_runner, shapes

from jaxinfer.engine.batch import Bucket
from jaxinfer.engine.sampler import Level
from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("llama")


@pytest.mark.parametrize("level", [Level.GREEDY, Level.EDITED])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_the_program_updates_the_cache_in_place(kind: str, level: Level):
    runner = random_runner("llama")
    wide = shapes(num_blocks=4 * ROWS * LENGTH // BLOCK)  # more than a step gathers
    bucket = Bucket(kind, ROWS if kind == "decode" else CHUNK, ROWS, LENGTH // BLOCK, level, -1)
    compiled = compile_step(runner.program, runner.params, wide, bucket)
    assert compiled.aliased_bytes >= compiled.cache_bytes
    assert compiled.large_copies == []


def test_a_running_engine_keeps_the_memory_of_its_cache():
    runner = random_runner("llama")
    engine = make_engine(runner)
    addresses = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(runner.cache)]
    first = jax.tree.leaves(runner.cache)
    for i, length in enumerate((3, 21, 40)):
        engine.add(make_request(str(i), prompt(length, i), SamplingParams(temperature=0, max_tokens=6, n=1)))
    while engine.has_work:
        engine.step()
    assert all(array.is_deleted() for array in first)
    assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves(runner.cache)] == addresses
