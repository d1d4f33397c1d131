"""A quantised cache: sharing, chunks, preemption, drafts and devices change no token, and half the bytes serve.

`test_deterministic` shows the same bit for bit with `deterministic=True`.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import checkpoint, cross
from support.cases import EDGES, GREEDY, alone, mixed
from support.tiny import (
    BLOCK,
    CHUNK,
    CONFIG,
    config,
    make_engine,
    make_request,
    prompt,
    quantised_runner,
    run,
    shapes_of,
)

from jaxinfer import LLM, SamplingParams
from jaxinfer.cli import main
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.errors import ConfigError
from jaxinfer.functional import split
from jaxinfer.functional.growing import GrowingCache
from jaxinfer.kernels.attention import quantised_cache
from jaxinfer.kv import cache as kv_cache
from jaxinfer.kv import groups
from jaxinfer.loading import weights
from jaxinfer.loading.plan import plan
from jaxinfer.serve import cli as serve
from jaxinfer.sharding import make_mesh
from jaxinfer.speculative_config import SpeculativeConfig

pytestmark = pytest.mark.xdist_group("kv cache dtype")

MODELS = [
    ("llama", "int8"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("alternating", "fp8"), ("gemma4", "int8"))),
]
MODELS += [pytest.param(*case, marks=pytest.mark.slow) for case in (("deepseek_v3", "fp8"), ("kimi_linear", "int8"))]
"""A model for each kind of layer: full, sliding, both side by side, latent, and latent beside recurrent ones."""


def everything() -> list[Any]:
    """Return greedy and seeded requests, one that forks, and one whose prefix another has computed."""
    fork = SamplingParams(temperature=0.3, seed=11, max_tokens=10, n=3)
    return [*mixed(EDGES), make_request("fork", prompt(18, 50), fork), make_request("again", prompt(18, 50), GREEDY)]


@pytest.mark.parametrize(("family", "codes"), MODELS)
def test_host_settings_change_no_token(family: str, codes: str):
    runner = quantised_runner(family, codes)
    expected = alone(runner, everything())
    longest = max(EDGES) + GREEDY.max_tokens
    pool = groups.blocks_needed(runner.program.layout.kinds, longest, BLOCK, CHUNK) + 2
    for host in ({}, {"budget": 5}, {"pool_blocks": pool}, {"prefix_caching": False}, {"decode_steps": 4}):
        engine = make_engine(runner, **host)
        assert run(engine, everything()) == expected, host
        assert (engine.scheduler.preempted > 0) == ("pool_blocks" in host)
    engine = make_engine(runner)
    run(engine, everything())
    found = everything()
    assert run(engine, found) == expected
    assert sum(request.cached_tokens > 0 for request in found) > 0, "published blocks serve later prompts"


@pytest.mark.slow
def test_a_contiguous_cache_gives_the_same_tokens():
    paged = quantised_runner("alternating", "fp8")
    runner = Runner(paged.program, paged.params, shapes_of(paged.program, contiguous=True))
    assert run(make_engine(runner, prefix_caching=False), everything()) == alone(paged, everything())


@pytest.mark.slow
def test_drafts_change_no_token():
    """Rejected drafts leave codes and scales that are written again."""
    base = quantised_runner("llama", "int8")
    wanted = [make_request(str(i), prompt(6, i) * 4, GREEDY) for i in range(4)]
    expected = alone(base, wanted)
    runner = Runner(base.program, base.params, replace(base.shapes, verify_buckets=(16,)), programs=base.programs)
    engine = make_engine(runner, speculative=SpeculativeConfig(num_speculative_tokens=4))
    assert run(engine, wanted) == expected
    assert engine.metrics.counters["spec_decode_num_draft_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tp"), [("llama", 4), ("deepseek_v3", 2)])
def test_several_devices_give_the_tokens_of_one(sharded: Callable[..., Runner], family: str, tp: int):
    """Two kv heads, which four devices store twice, and latents, which all devices store."""
    single, several = (sharded(family, count, kv_cache_dtype="int8") for count in (1, tp))
    assert run(make_engine(several), everything()) == run(make_engine(single), everything())
    assert several.cache[0].key_scales.sharding == several.cache[0].keys.sharding


@pytest.mark.slow
def test_encoder_keys_are_quantised_too():
    mesh = make_mesh(1)
    module = weights.load(cross.folder(), mesh, progress=False)
    program, params = split(module, mesh, kv_cache_dtype="int8")
    runner = Runner(program, params, shapes_of(program, cross_buckets=cross.UNITS))
    wanted = [
        cross.cross_request(str(i), cross.text(length, i), GREEDY, [cross.START, *prompt(2, i)])
        for i, length in enumerate((1, BLOCK, CHUNK + 1, 33))
    ]
    expected = cross.alone(wanted, runner)
    assert run(make_engine(runner, budget=5), [cross.again(request) for request in wanted]) == expected
    assert {cached.keys.dtype for cached in runner.cache} == {np.dtype(np.int8)}


@cache
def logits(codes: str, kernel: str) -> np.ndarray:
    """Return logits of a prompt of 60 tokens in chunks, the last one of a single token, which is a decode step."""
    mesh = make_mesh(1)
    program, params = split(weights.random(config("llama"), mesh), mesh, attention_kernel=kernel, kv_cache_dtype=codes)
    cached = GrowingCache.reserve(program, 1, 64, 16)
    for part in (prompt(60, 1)[:40], prompt(60, 1)[40:59], prompt(60, 1)[59:]):
        found, cached = cached.append(params, [part])
    return np.asarray(found[0])


@pytest.mark.parametrize(("codes", "most"), [("int8", 0.01), pytest.param("fp8", 0.1, marks=pytest.mark.slow)])
def test_logits_are_near_those_of_an_exact_cache(codes: str, most: float):
    """And are not equal to them; both kernels agree."""
    exact, found = logits("auto", "xla"), logits(codes, "xla")
    error = np.abs(found - exact).max() / exact.std()
    assert 1e-5 < error < most
    np.testing.assert_allclose(logits(codes, "auto"), found, atol=1e-4)


def test_a_growing_cache_adopts_and_returns_keys_in_the_models_dtype():
    mesh = make_mesh(1)
    program, _ = split(weights.random(config("llama"), mesh), mesh, kv_cache_dtype="int8")
    layers = [list(pair) for pair in np.random.default_rng(0).normal(size=(2, 2, 1, 2, 11, 16)).astype(np.float32)]
    cached = GrowingCache.adopt(program, layers, capacity=16, step=8)
    for number, (keys, values) in enumerate(layers):
        for found, given in zip(cached.layer(number), (keys, values), strict=True):
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, given, atol=np.abs(given).max() / 127)
    assert cached.nbytes == 2 * 2 * 2 * 16 * (16 + 2), "layers, keys and values, heads, positions, codes and a scale"


def made(folder: Path, codes: str, **settings: Any) -> LLM:
    return LLM(
        str(folder), kv_cache_dtype=codes, kv_cache_memory_bytes=200_000, max_model_len=128, max_num_seqs=4, **settings
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hf = CONFIG | dict(architectures=["LlamaForCausalLM"], head_dim=64, dtype="bfloat16")
    return checkpoint.write(tmp_path_factory.mktemp("kv"), hf)


def test_twice_the_positions_fit_and_the_plan_says_so(folder: Path):
    blocks, scores = {}, {}
    for codes in ("auto", "int8"):
        with made(folder, codes) as llm:
            program, shapes = llm._engine.runner.program, llm._engine.runner.shapes
            block = kv_cache.block_bytes(program.layout.array_specs, 16, program.dtype, program.mesh)
            held = shapes.num_blocks * block
            assert sum(array.nbytes for array in jax.tree.leaves(llm._engine.runner.cache)) == held
            assert plan(str(folder), kv_cache_dtype=codes).cache.block_device_bytes == block
            gauges = {metric.name: metric.value for metric in llm.get_metrics()}
            assert gauges["jaxinfer:kv_cache_bytes"] == held
            assert ("cache in int8" in repr(llm)) == (codes == "int8")
            [scored] = llm.score([[5, 6]], [[7, 8, 9]], use_tqdm=False)
            blocks[codes], scores[codes] = shapes.num_blocks, scored.logprobs
    assert blocks["int8"] == blocks["auto"] * 128 // 66, "two bytes of a scale beside the 64 of a head"
    np.testing.assert_allclose(scores["int8"], scores["auto"], atol=0.05)


def test_command_lines_pass_it_on(folder: Path, capsys: pytest.CaptureFixture[str]):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    assert "kv_cache_dtype" in serve.ENGINE
    assert parser.parse_args(["DIR", "--kv-cache-dtype", "fp8_e4m3"]).kv_cache_dtype == "fp8_e4m3"
    with pytest.raises(SystemExit):
        parser.parse_args(["DIR", "--kv-cache-dtype", "fp8_e5m2"])
    assert "auto, fp8, fp8_e4m3, int8" in capsys.readouterr().err.replace("'", "")
    sizes = []
    for codes in ("auto", "int8"):
        assert main(["plan", "--model", str(folder), "--kv-cache-dtype", codes, "--json"]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["cache"]["block_device_bytes"])
    assert sizes[1] * 128 == sizes[0] * 66


def test_float16_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config("llama")))
    for call in (LLM, plan):  # before weights are looked for
        with pytest.raises(ConfigError, match="kv_cache_dtype is 'int8', but dtype float16"):
            call(tmp_path, dtype="float16", kv_cache_dtype="int8")
    mesh = make_mesh(1)
    module = weights.random(config("llama"), mesh, dtype="float16")
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'int8', but dtype float16 .* use dtype='bfloat16'"):
        split(module, mesh, kv_cache_dtype="int8")


@pytest.mark.parametrize("to", [np.dtype(np.int8), np.dtype(np.uint8)])
def test_codes_are_made_with_the_scale_that_is_stored(to):
    """The scale is rounded by `reduce_precision`: XLA on a GPU removes a conversion to bfloat16 and back."""
    program = jax.make_jaxpr(lambda x: quantised_cache.quantise(x, to))(np.ones((2, 8), np.float32))
    made = {str(one.outvars[0]): one for one in program.eqns}
    [divided] = [one for one in program.eqns if one.primitive.name == "div"]
    scale = made[str(divided.invars[1])]
    assert scale.primitive.name == "reduce_precision" and scale.params == {"exponent_bits": 8, "mantissa_bits": 7}
