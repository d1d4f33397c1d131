"""The engine's mesh over a trainer's: names, order of devices, refusals; weights over the axis `fsdp`."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxinfer import LLM, demo
from jaxinfer.errors import ConfigError
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh, rules, serving_mesh
from jaxinfer.sharding import mesh as meshes

TEXT = dict(
    architectures=["LlamaForCausalLM"],
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
)


def trainer() -> Mesh:
    """Make a mesh as trainers do, with Explicit axes."""
    return jax.make_mesh((2, 2, 2), ("dp", "fsdp", "tp"), axis_types=(AxisType.Explicit,) * 3)


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        ({"model": "tp"}, dict(replica_dp=2, replica_fsdp=2, model=2)),
        ({"model": ("tp",), "fsdp": "fsdp"}, dict(replica_dp=2, fsdp=2, model=2)),
        ({"model": ("fsdp", "tp")}, dict(replica_dp=2, model=4)),
        ({"model": ("dp", "fsdp", "tp")}, dict(model=8)),
        ({"fsdp": ("dp", "fsdp"), "model": "tp"}, dict(fsdp=4, model=2)),
        ({"fsdp": "fsdp"}, dict(replica_dp=2, fsdp=2, replica_tp=2, model=1)),
        ({}, dict(replica_dp=2, replica_fsdp=2, replica_tp=2, model=1)),
    ],
)
def test_devices_keep_their_order_under_the_engine_s_names(axes, sizes):
    mesh = serving_mesh(trainer(), axes)
    assert dict(mesh.shape) == sizes and meshes.size(mesh) == sizes["model"]
    assert mesh.devices.flatten().tolist() == trainer().devices.flatten().tolist()
    assert set(mesh.axis_types) == {AxisType.Auto} and meshes.normalise(mesh) is mesh


def test_axes_that_are_no_neighbours_stand_in_the_order_in_which_they_are_named():
    mesh = serving_mesh(trainer(), {"model": ("tp", "dp")})
    assert dict(mesh.shape) == dict(model=4, replica_fsdp=2)
    assert (mesh.devices == trainer().devices.transpose(2, 0, 1).reshape(4, 2)).all()


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"model": "mp"}, "'model' is mapped to 'mp', which the mesh lacks; it has 'dp' of size 2, 'fsdp' of size 2"),
        ({"model": ("tp", "ep")}, "'model' is mapped to 'ep', which the mesh lacks"),
        ({"model": "tp", "fsdp": "tp"}, "axis 'tp' of the mesh is named twice in .*; name it once"),
        ({"expert": "tp"}, "'expert' is unknown; known: 'model' divides .*; axes of the mesh that are not named hold"),
    ],
)
def test_what_cannot_be_mapped_is_refused_by_name(axes, message):
    with pytest.raises(ConfigError, match=message):
        serving_mesh(trainer(), axes)


def test_an_llm_refuses_axes_without_a_mesh_and_sizes_that_contradict():
    with pytest.raises(ConfigError, match="axes is {'model': 'tp'}, but there is no mesh whose axes it names; pass"):
        LLM(demo.path(), axes={"model": "tp"})
    with pytest.raises(ConfigError, match="tensor_parallel_size is 4, but axis 'model' of the mesh has size 2"):
        LLM(demo.path(), mesh=trainer(), axes={"model": "tp"}, tensor_parallel_size=4)
    with pytest.raises(ConfigError, match="axis 'dp' of size 2 is unknown.*say what it is for with axes="):
        LLM(demo.path(), mesh=trainer())


def test_matrices_are_divided_along_the_first_free_axis_and_vectors_are_whole():
    mesh = serving_mesh(trainer(), {"model": "tp", "fsdp": "fsdp"})
    model_family, config = weights.parse(TEXT)
    params = weights.rules.parameters(weights.abstract(model_family, config, np.dtype(np.float32), mesh))
    placed = {
        path: rules.of(mesh, param.get_metadata(), param.shape, path).spec
        for path, param in params.items()
        if "layers.1" not in path
    }
    assert placed["layers.0.attention.qkv.weight"] == PartitionSpec("model", None, "fsdp")
    assert placed["layers.0.mlp.down.weight"] == PartitionSpec("fsdp", "model")
    assert placed["embedding.weight"] == PartitionSpec("model", "fsdp")
    assert "fsdp" not in placed["norm.scale"]
    for path, spec in placed.items():
        param = params[path]
        gathered = rules.of(mesh, param.get_metadata(), param.shape, path, gathered=True).spec
        assert gathered == PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec)) or gathered == spec


def test_sizes_that_do_not_divide_are_named():
    mesh = jax.make_mesh((5,), ("shards",), devices=jax.devices()[:5])
    model_family, config = weights.parse(TEXT)
    with pytest.raises(ConfigError, match=r"embedding.weight: no free axis of shape \[96, 64\].*'fsdp' of size 5; lea"):
        weights.abstract(model_family, config, np.dtype(np.float32), serving_mesh(mesh, {"fsdp": "shards"}))
    with pytest.raises(ConfigError, match="does not divide over mesh axis 'model' of size 5"):
        weights.abstract(model_family, config, np.dtype(np.float32), serving_mesh(mesh, {"model": "shards"}))


def test_models_that_do_not_gather_refuse_fsdp():
    mesh = serving_mesh(trainer(), {"fsdp": "fsdp"})
    with pytest.raises(ConfigError, match="axis 'fsdp' of size 2 divides the weights of text-only decoders"):
        meshes.check_fsdp(mesh, False)
    meshes.check_fsdp(mesh, True)
    meshes.check_fsdp(make_mesh(2), False)


def test_a_parameter_without_the_axis_is_placed_as_before():
    placed = rules.of(make_mesh(2), dict(logical_axes=("vocab", "embed")), (8, 4), "embedding.weight")
    assert placed == NamedSharding(make_mesh(2), PartitionSpec("model", None))
