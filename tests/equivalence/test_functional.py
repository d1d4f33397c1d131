"""The engine gives the same as the public functions: every token from a prefill of all tokens before it."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from support.cases import EDGES, GREEDY, requests
from support.tiny import BLOCK, config, make_engine, random_runner, run

from jaxinfer import functional
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.xdist_group("llama")

WIDTH = 64 // BLOCK


@pytest.fixture(scope="module")
def whole():
    """Function from token ids to the most likely next token, without a cache."""
    runner = random_runner()
    step = jax.jit(partial(functional.prefill, runner.program))

    def next_token(ids: list[int]) -> int:
        cache = functional.init_cache(runner.program, WIDTH, BLOCK)
        tables = np.arange(WIDTH, dtype=np.int32)[::-1][None]
        batch = functional.prefill_batch([(np.array(ids, np.int32), 0, len(ids))], tables, tokens=64)
        logits, _ = step(runner.params, cache, batch)
        return int(logits[0].argmax())

    return next_token


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize(("dtype", "other"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_cache_has_the_dtype_of_the_embedding_whatever_a_single_parameter_has(dtype, other, quantization):
    model_family, parsed = weights.parse(config("llama") | {"tie_word_embeddings": True})
    module = weights.abstract(model_family, parsed, np.dtype(dtype), make_mesh(), quantization=quantization)
    module.norm.scale = nnx.Param(jax.ShapeDtypeStruct((32,), np.dtype(other)), **module.norm.scale.get_metadata())
    program, _ = functional.split(module)
    assert program.dtype == np.dtype(dtype)


def test_the_engine_is_its_functions(whole):
    runner = random_runner()
    wanted = requests(EDGES, GREEDY)
    for request, [made] in zip(wanted, run(make_engine(runner, budget=7), wanted), strict=True):
        ids = request.prompt.tolist()
        assert made == [whole(ids + made[:i]) for i in range(len(made))]


def test_decode_after_prefill_is_prefill_of_all(whole):
    runner = random_runner()
    step = jax.jit(partial(functional.decode, runner.program))
    prefill = jax.jit(partial(functional.prefill, runner.program))
    ids = np.arange(5, 5 + 2 * BLOCK + 3, dtype=np.int32)
    tables = np.arange(WIDTH, dtype=np.int32)[None]
    cache = functional.init_cache(runner.program, WIDTH, BLOCK)
    batch = functional.prefill_batch([(ids[:BLOCK], 0, BLOCK)], tables, tokens=64)
    _, cache = prefill(runner.params, cache, batch)
    for at in range(BLOCK, len(ids)):
        batch = functional.DecodeBatch(ids[at : at + 1], np.array([at], np.int32), tables)
        logits, cache = step(runner.params, cache, batch)
        assert int(logits[0].argmax()) == whole(ids[: at + 1].tolist())
