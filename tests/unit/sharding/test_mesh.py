"""User-supplied meshes: accepted, normalized and refused ones."""

import jax
import pytest
from jax.sharding import AxisType, Mesh

from jaxinfer.errors import ConfigError
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding import mesh as meshes


def user_mesh(kind: AxisType = AxisType.Explicit, **sizes: int) -> Mesh:
    """Make a mesh of the last devices, so that default placement would be noticed."""
    count = 1
    for size in sizes.values():
        count *= size
    kinds = (kind,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=jax.devices()[-count:])


@pytest.mark.parametrize("kind", AxisType)
@pytest.mark.parametrize("sizes", [dict(model=1), dict(model=4), dict(data=2, model=4), dict(model=2, data=1)])
def test_any_mesh_with_the_axis_becomes_auto_over_the_same_devices(kind, sizes):
    given = user_mesh(kind, **sizes)
    mesh = meshes.normalise(given, sizes["model"])
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert mesh.axis_names == given.axis_names and (mesh.devices == given.devices).all()
    assert meshes.normalise(mesh) is mesh
    assert (meshes.size(mesh), meshes.copies(mesh)) == (sizes["model"], sizes.get("data", 1))


def test_an_abstract_mesh_is_accepted():
    mesh = meshes.normalise(user_mesh(model=4).abstract_mesh)
    assert set(mesh.axis_types) == {AxisType.Auto} and meshes.size(mesh) == 4


def test_make_mesh_needs_no_normalization():
    mesh = make_mesh(4)
    assert meshes.normalise(mesh) is mesh


@pytest.mark.parametrize(
    ("sizes", "asked", "message"),
    [
        (dict(tp=4), None, "axis 'tp' of size 4 is unknown.*say what it is for .*, or .*make_mesh\\(4\\)"),
        (dict(model=2, expert=2), None, "axis 'expert' of size 2 is unknown"),
        (dict(data=4), None, "no axis 'model', only {'data': 4}; add one of size 1"),
        (dict(model=4), 2, "tensor_parallel_size is 2, but axis 'model' of the mesh has size 4; pass one"),
        (dict(model=4), 1, "tensor_parallel_size is 1, but axis 'model' of the mesh has size 4"),
    ],
)
def test_an_invalid_mesh_is_refused_with_axis_size_and_remedy(sizes, asked, message):
    with pytest.raises(ConfigError, match=message):
        meshes.normalise(user_mesh(**sizes), asked)


def test_the_data_axis_needs_a_vision_tower():
    mesh = meshes.normalise(user_mesh(data=2, model=2))
    meshes.check_data_axis(mesh, True)
    meshes.check_data_axis(make_mesh(2), False)
    with pytest.raises(
        ConfigError, match="axis 'data' of size 2 divides the images .* this model has none that .*; put"
    ):
        meshes.check_data_axis(mesh, False)


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match="tensor_parallel_size is 9, but JAX sees 8 device"):
        make_mesh(9)
