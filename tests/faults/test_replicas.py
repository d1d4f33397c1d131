"""Replicas over an axis of the mesh (`axes={"data": ...}`): results of one engine, and calls that reach all engines."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from faults.conftest import SETTINGS
from flax import nnx
from jax.sharding import Mesh
from support import checkpoint

from jaxinfer import LLM, AsyncLLM, RequestOutputKind, SamplingParams
from jaxinfer.errors import CapacityError, CheckpointError, ConfigError, EngineDeadError, EngineError
from jaxinfer.loading import checksum, weights
from jaxinfer.sharding import mesh as meshes
from jaxinfer.sharding import serving_mesh

pytestmark = pytest.mark.xdist_group("replicas")

OWN = SETTINGS | dict(deterministic=True, decode_buckets=None, prefill_buckets=None, dtype="float32")
PROMPTS = [[10 + i, 11, 12 + i, *range(20, 20 + i)] for i in range(7)]
SAMPLED = SamplingParams(temperature=0.9, n=2, max_tokens=9, ignore_eos=True, logprobs=0)
SAMPLED_BY_SEED = [replace(SAMPLED, seed=i) for i in range(7)]
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
AXES = {"data": "dp"}


def trainer(count: int = 2) -> Mesh:
    return jax.make_mesh((count,), ("dp",), devices=jax.devices()[:count])


@pytest.fixture(scope="module")
def one(folder) -> Iterator[LLM]:
    """The same model without replicas."""
    with LLM(folder, **OWN) as made:
        yield made


@pytest.fixture(scope="module")
def module(folder) -> Any:
    return weights.load(folder, serving_mesh(trainer(), AXES), dtype="float32", progress=False)


@pytest.fixture(scope="module")
def replicated(folder, module) -> Iterator[LLM]:
    with LLM(module, tokenizer=folder, mesh=trainer(), axes=AXES, **OWN) as made:
        yield made


@pytest.fixture
def llm(replicated) -> Iterator[LLM]:
    """Two replicas with nothing cached; afterwards nothing may run on either."""
    replicated.reset_prefix_cache()
    yield replicated
    replicated._together(lambda engines: None)  # what was in their queues has been taken
    for replica in replicated._replicas:
        assert not replica.engine.requests and not replica.engine.control.paused and not replica.engine.control.level


def found(outputs: Any) -> list[Any]:
    """Return tokens and log-probabilities of each sample."""
    return [
        [(c.token_ids, [at[token].logprob for at, token in zip(c.logprobs, c.token_ids)]) for c in output.outputs]
        for output in outputs
    ]


def made(llm: LLM) -> list[int]:
    return [replica.engine.metrics.counters["generation_tokens"] for replica in llm._replicas]


def test_results_are_those_of_one_engine_and_both_work(llm, one):
    before = made(llm)
    expected = found(one.generate(PROMPTS, SAMPLED_BY_SEED, use_tqdm=False))
    assert found(llm.generate(PROMPTS, SAMPLED_BY_SEED, use_tqdm=False)) == expected
    shares = [after - old for after, old in zip(made(llm), before, strict=True)]
    assert sorted(shares) == [3 * 2 * 9, 4 * 2 * 9], "requests went to the replica with fewer samples"
    scores = [[s.logprobs for s in x.score(PROMPTS, [[5, 6, 7]] * 7, use_tqdm=False)] for x in (llm, one)]
    assert scores[0] == scores[1]


def test_samples_without_a_seed_differ_between_replicas(llm):
    outputs = llm.generate([PROMPTS[0]] * 4, SAMPLED, use_tqdm=False)
    assert len({tuple(c.token_ids) for o in outputs for c in o.outputs}) == 8


def test_a_stream_yields_what_both_make(llm, one):
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    tokens: dict[tuple[int, ...], list[int]] = {}
    for output in llm.stream(PROMPTS, params):
        tokens.setdefault(tuple(output.prompt_token_ids), []).extend(output.outputs[0].token_ids)
    assert tokens == {
        tuple(o.prompt_token_ids): o.outputs[0].token_ids for o in one.generate(PROMPTS, params, use_tqdm=False)
    }
    dropped = llm.stream(PROMPTS, LONG)
    next(dropped)
    dropped.close()
    llm.generate(PROMPTS[0], SAMPLED, use_tqdm=False)  # behind the aborts; the fixture checks that nothing is left
    assert list(llm.stream([], params)) == llm.generate([], use_tqdm=False) == []


def test_async_requests_go_to_both(llm, one):
    async def run() -> list[Any]:
        shared = AsyncLLM.of(llm)
        assert shared.num_waiting == 0
        llm.pause()  # or the first may have ended before the last is queued
        streams = [await shared.add_request(p, LONG, request_id=f"r{i}") for i, p in enumerate(PROMPTS)]
        assert sorted(len(replica.engine.requests) for replica in llm._replicas) == [3, 4]
        with pytest.raises(ValueError, match="request id 'r1' is in use"):
            await shared.add_request(PROMPTS[0], LONG, request_id="r1")
        llm.resume()
        return [[token async for output in one for token in output.outputs[0].token_ids] for one in streams]

    assert asyncio.run(run()) == [output.outputs[0].token_ids for output in one.generate(PROMPTS, LONG, use_tqdm=False)]


def test_no_weight_is_copied(llm, module):
    """The buffers of the trainer's replicated arrays are those of the replicas, each device's its own."""
    given: dict[int, set[int]] = {0: set(), 1: set()}
    for array in jax.tree.leaves(nnx.state(module)):
        for shard in array.addressable_shards:
            given[shard.device.id].add(shard.data.unsafe_buffer_pointer())
    for place, replica in enumerate(llm._replicas):
        params = replica.engine.runner.params
        assert {device.id for param in params for device in param.devices()} == {place}
        assert {param.unsafe_buffer_pointer() for param in params} <= given[place]


@pytest.fixture
def own_weights(llm) -> Iterator[dict[str, np.ndarray]]:
    """The weights as arrays of NumPy; they are put back."""
    kept = {name: np.asarray(tensor) for name, tensor in llm.weights().items()}
    yield kept
    llm.update_weights(kept)


def test_new_weights_reach_all_replicas_and_bad_ones_none(llm, one, own_weights):
    other = weights.random(checkpoint.CONFIG | {"dtype": "float32"}, meshes.make_mesh(1), seed=5)
    expected = found(llm.generate(PROMPTS, SAMPLED_BY_SEED, use_tqdm=False))
    update, version = llm.update_weights(other), llm.weight_version
    assert update.version == version and update.checksum == one.update_weights(other).checksum
    new = found(llm.generate(PROMPTS, SAMPLED_BY_SEED, use_tqdm=False))
    assert new == found(one.generate(PROMPTS, SAMPLED_BY_SEED, use_tqdm=False)) != expected
    assert llm.weights_checksum() == one.weights_checksum() == checksum.checksum(llm.weights())
    for tensors, message in (
        ({name: own_weights[name] for name in list(own_weights)[1:]}, list(own_weights)[0]),
        (own_weights | {"model.norm.weight": own_weights["model.norm.weight"] * np.nan}, "model.norm.weight"),
    ):
        with pytest.raises(CheckpointError, match=message):
            llm.update_weights(tensors)
    assert found(llm.generate(PROMPTS, SAMPLED_BY_SEED, use_tqdm=False)) == new and llm.weight_version == version
    one.update_weights(own_weights)
    [place] = [i for i, param in enumerate(llm._replicas[1].engine.runner.params) if param.shape == (32,)][:1]
    params = llm._replicas[1].engine.runner.params
    params[place] = params[place] + 1
    with pytest.raises(EngineError, match="weights_checksum: the replicas have different weights"):
        llm.weights_checksum()


def test_a_pause_reaches_both_and_sleep_all_or_none(llm):
    streams = llm.stream(PROMPTS[:2], LONG)
    next(streams)
    assert [len(replica.engine.requests) for replica in llm._replicas] == [1, 1]
    llm.pause()
    before = made(llm)
    with pytest.raises(RuntimeError, match="sleep while 1 request"):
        llm.sleep()
    assert made(llm) == before and all(replica.engine.control.paused for replica in llm._replicas)
    llm.resume()
    assert [o.finished for o in streams][-1]
    with pytest.raises(RuntimeError, match="resume: the engine is not paused"):
        llm.resume()


def test_sleep_with_requests_on_the_second_replica_leaves_both_awake(llm):
    stream = llm.stream(PROMPTS[:2], [replace(LONG, max_tokens=1), replace(LONG, max_tokens=110)])
    while not next(stream).finished:
        pass
    llm.pause()
    assert [len(replica.engine.requests) for replica in llm._replicas] == [0, 1]
    with pytest.raises(RuntimeError, match="sleep while 1 request"):
        llm.sleep()
    assert not any(replica.engine.control.level for replica in llm._replicas)
    llm.resume()
    stream.close()
    llm.pause("wait")
    llm.resume()
    llm.sleep()
    with pytest.raises(RuntimeError, match="the engine sleeps"):
        llm.generate(PROMPTS[0], use_tqdm=False)
    llm.wake_up()
    assert len(llm.generate(PROMPTS, SAMPLED, use_tqdm=False)) == 7


def test_figures_are_of_each_replica_and_views_of_one_cache_are_refused(llm, one):
    running = [metric for metric in llm.get_metrics() if metric.name == "jaxinfer:num_requests_running"]
    assert [metric.labels for metric in running] == [(("engine", "0"),), (("engine", "1"),)]
    assert "2 engines, 2 devices" in repr(llm)
    own = dict(sampling=["greedy"], use_tqdm=False)
    assert llm.warmup(**own).programs == 2 * one.warmup(**own).programs
    for view in (llm.start_recording, lambda: llm.cache):
        with pytest.raises(ConfigError, match=r"this LLM has 2 engines \(axes 'data'\)"):
            view()


def test_a_failing_step_names_its_replica_and_the_other_goes_on(llm, one, monkeypatch):
    def fails(*arguments: Any) -> None:
        raise RuntimeError("the device fell over")

    with monkeypatch.context() as patch:
        patch.setattr(llm._replicas[1].engine.runner, "run", fails)
        outputs = llm.generate(PROMPTS[:2], LONG, use_tqdm=False)
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error"]
    assert outputs[1].outputs[0].stop_reason.startswith("replica 1 (devices 1): its step failed")
    assert outputs[0].outputs[0].token_ids == one.generate(PROMPTS[0], LONG, use_tqdm=False)[0].outputs[0].token_ids


def test_a_dead_replica_is_named_and_gets_no_more_requests(folder, monkeypatch):
    with LLM(folder, mesh=trainer(), axes=AXES, **OWN) as llm:
        dead = llm._replicas[0].engine
        with monkeypatch.context() as patch:
            patch.setattr(dead.runner, "run", lambda *_: 1 / 0)
            patch.setattr(dead.runner, "reset", lambda: 1 / 0)
            with pytest.raises(EngineDeadError, match=r"replica 0 \(devices 0\): the engine is dead"):
                llm.generate(PROMPTS[:2], LONG, use_tqdm=False)
        assert len(llm.generate(PROMPTS, SAMPLED, use_tqdm=False)) == 7 and made(llm)[0] == 0
        for call in (lambda: llm.update_weights(llm.weights()), llm.pause, llm.sleep, AsyncLLM.of(llm).check_alive):
            with pytest.raises(EngineDeadError, match="replica 0"):
                call()
        llm._replicas[1].thread.run(llm._replicas[1].engine.recovery.kill, "pulled out")
        with pytest.raises(EngineDeadError, match="replica 0"):
            llm.generate(PROMPTS[:2], LONG, use_tqdm=False)


def test_what_cannot_be_replicated_is_refused_by_name(folder):
    with pytest.raises(ConfigError, match="'data' is mapped to 'ep', which the mesh lacks; it has 'dp' of size 2"):
        LLM(folder, mesh=trainer(), axes={"data": "ep"}, **OWN)
    with pytest.raises(ConfigError, match="adapters are not supported where axes has 'data' .2 replicas."):
        LLM(folder, mesh=trainer(), axes=AXES, max_adapters=2, **OWN)
    with pytest.raises(CapacityError, match=r"replica 0 \(devices 0\): the cache"):
        LLM(folder, mesh=trainer(), axes=AXES, **OWN | {"kv_cache_memory_bytes": 1})


@pytest.mark.slow
def test_replicas_of_several_devices(folder, one):
    mesh, axes = jax.make_mesh((2, 2, 2), ("dp", "fsdp", "tp")), {"fsdp": "fsdp", "model": "tp", "data": "dp"}
    with LLM(folder, mesh=mesh, axes=axes, **OWN) as llm:
        assert [len(params[0].devices()) for params in (r.engine.runner.params for r in llm._replicas)] == [4, 4]
        tokens = [[c.token_ids for c in o.outputs] for o in llm.generate(PROMPTS, SAMPLED_BY_SEED, use_tqdm=False)]
        assert tokens == [
            [c.token_ids for c in o.outputs] for o in one.generate(PROMPTS, SAMPLED_BY_SEED, use_tqdm=False)
        ]
        assert min(made(llm)) > 0
