"""A model on a trainer's mesh gives the tokens of one device, with replicas, tensor parallelism and fsdp; its weights
come from arrays that lie on the trainer's mesh in the trainer's way."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support import checkpoint
from support.cases import EDGES, GREEDY, requests
from support.lowering import abstract_model, compile_step
from support.tiny import BLOCK, CHUNK, LENGTH, ROWS, VOCAB, config, make_engine, run, shapes, shapes_of

from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.buckets import step_shape
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.functional import split, training
from jaxinfer.loading import weights
from jaxinfer.loading.update import WeightTable
from jaxinfer.sharding import make_mesh, serving_mesh
from jaxinfer.sharding.collectives import DECODE

pytestmark = [pytest.mark.xdist_group("trainer mesh")]

AXES = {
    "replicas": {"model": ("tp",)},
    "fsdp": {"model": "tp", "fsdp": "fsdp"},
    "fsdp alone, over two axes": {"fsdp": ("dp", "fsdp")},
    "two axes that are no neighbours": {"model": ("dp", "tp")},
}
CASES = [
    pytest.param(axes, family, marks=[pytest.mark.slow] * ((axes, family) != ("fsdp", "llama")))
    for family in ("llama", "qwen3_moe", "gpt_oss", "qwen3_next")
    for axes in AXES
    if (axes, family) != ("two axes that are no neighbours", "qwen3_next")  # it has two heads of states
]


def trainer() -> Mesh:
    return jax.make_mesh((2, 2, 2), ("dp", "fsdp", "tp"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Runner]:
    """Runner of a family's checkpoint, the same for every mesh."""

    @cache
    def folder(family: str) -> Any:
        hf = config(family) | {"num_attention_heads": 8, "num_key_value_heads": 4}
        return checkpoint.write(tmp_path_factory.mktemp(family), hf, with_tokenizer=False)

    @cache
    def made(family: str, axes: str | None) -> Runner:
        mesh = make_mesh(1) if axes is None else serving_mesh(trainer(), AXES[axes])
        program, params = split(weights.load(folder(family), mesh, progress=False), mesh)
        return Runner(program, params, shapes_of(program))

    return made


def tokens(runner: Runner) -> Any:
    return run(make_engine(runner), requests(EDGES[:4], GREEDY))


@pytest.mark.parametrize(("axes", "family"), CASES)
def test_tokens_are_those_of_one_device(loaded, axes, family):
    runner = loaded(family, axes)
    assert {len(param.sharding.device_set) for param in runner.params} == {8}
    assert tokens(runner) == tokens(loaded(family, None))


def test_fsdp_keeps_a_part_of_every_matrix_on_each_device(loaded):
    kept, whole = (
        [param.addressable_shards[0].data.nbytes for param in loaded("llama", axes).params if param.ndim > 1]
        for axes in ("fsdp", None)
    )
    # Over two devices of `fsdp` and two of `tp`; the vocabulary and copies of heads are padded.
    assert sum(kept) <= 0.26 * sum(whole)


def decode_step(axes: str, layers: int) -> jax.stages.Compiled:
    """Compile a decode step whose weights are much larger than its activations."""
    hf = config("llama") | dict(num_hidden_layers=layers, hidden_size=256, intermediate_size=512, dtype="float32")
    mesh = serving_mesh(trainer(), AXES[axes])
    program, params = abstract_model(hf | {"num_attention_heads": 8, "vocab_size": 96}, mesh)
    bucket = Bucket(DECODE, ROWS, ROWS, LENGTH // BLOCK, Level.GREEDY, -1, tile=program.tile)
    return compile_step(program, params, shapes(switched=False), bucket).executable


def test_each_layer_gathers_its_weights_when_its_input_is_there():
    few, many = decode_step("fsdp", 2), decode_step("fsdp", 6)
    gathers = [len(re.findall(r" all-gather(?:-start)?\(", step.as_text())) for step in (few, many)]
    plain = len(re.findall(r" all-gather(?:-start)?\(", decode_step("replicas", 2).as_text()))
    assert gathers[1] - gathers[0] == 4 * 4, "qkv, out, gate_up and down of each layer"
    assert gathers[0] == plain + 2 * 4 + 2, "and embedding and head"
    if jax.__version_info__ < (0, 11):
        return  # this compiler gathers all layers before the first one
    # What four more layers need beside their inputs: not their gathered weights, 4 * 1.2 MB on each device.
    more = many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes
    assert more < 1 << 20


def test_weights_of_the_trainer_s_mesh_reach_the_engine_without_the_host(loaded, monkeypatch):
    runner = loaded("llama", "fsdp")
    table = WeightTable(runner.program, runner.params)
    specs = {2: PartitionSpec("fsdp", "tp"), 1: PartitionSpec("fsdp")}
    mesh, given = trainer(), {}
    for name, tensor in table.tensors(runner.params):
        fits = [axis if tensor.shape[i] % 2 == 0 else None for i, axis in enumerate(specs[tensor.ndim])]
        given[name] = jax.device_put(np.asarray(tensor), NamedSharding(mesh, PartitionSpec(*fits)))
    read, kind = [], type(given["model.norm.weight"])
    whole = kind.__array__

    def watched(self: jax.Array, *args: Any, **how: Any) -> np.ndarray:
        read.append(self.size)
        return whole(self, *args, **how)

    monkeypatch.setattr(kind, "__array__", watched)
    found: list[Any] = [None] * len(runner.params)
    table.apply(table.prepare(given), found)
    assert read and max(read) <= 3, "the sums of a tensor"
    monkeypatch.undo()
    for new, param in zip(found, runner.params, strict=True):
        assert new.sharding == param.sharding
        np.testing.assert_array_equal(new, param)


@pytest.mark.slow
def test_gradients_on_a_mesh_are_those_of_one_device(tmp_path):
    """Of log-probabilities with the bits of serving, layers computed again."""
    folder = checkpoint.write(tmp_path / "llama", config("llama"), with_tokenizer=False)
    ids = np.random.default_rng(0).integers(3, VOCAB, (2, 2 * CHUNK + 3))
    found = {}
    for tp in (1, 2):
        mesh = make_mesh(tp)
        program, params = split(weights.load(folder, mesh, progress=False), mesh, deterministic=True)
        shape = step_shape(program, shapes_of(program, switched=True), "auto")
        module = program.module(params)
        training.prepare(module)
        graph, state = nnx.split(module, nnx.Param)

        def loss(state: nnx.State, graph=graph, shape=shape) -> jax.Array:
            return training.logprobs(nnx.merge(graph, state), jax.numpy.asarray(ids), serving=shape, remat=True).mean()

        slope = jax.tree.leaves(jax.jit(jax.grad(loss))(state))
        assert tp == 1 or {x.sharding.is_fully_replicated for x in slope} == {True, False}
        found[tp] = {name: np.asarray(x) for name, x in WeightTable(program, params).tensors(slope)}
    for name, expected in found[1].items():
        np.testing.assert_allclose(found[2][name], expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)
