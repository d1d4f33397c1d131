"""Rules from logical axes to mesh axes: shardings, and sizes that do not divide."""

import pytest
from jax.sharding import PartitionSpec

from jaxinfer.errors import ConfigError
from jaxinfer.sharding import axes, make_mesh, rules


def test_every_logical_axis_has_a_rule_and_no_other_name_has():
    assert rules.RULES.keys() == axes.LOGICAL_AXES


def test_a_replicated_parameter_is_whole_on_every_device_whatever_its_axes():
    metadata = {"logical_axes": (axes.VOCAB, axes.EMBED), "replicated": True}
    placed = rules.of(make_mesh(4), metadata, (97, 32), "embedding.weight")
    assert placed.spec == PartitionSpec() and placed.is_fully_replicated
    metadata["replicated"] = False
    assert rules.of(make_mesh(4), metadata, (100, 32), "embedding.weight").spec == PartitionSpec("model", None)


def test_what_does_not_divide_is_named_with_path_axis_sizes_and_remedies():
    metadata = {"logical_axes": (axes.VOCAB, axes.EMBED), "module": "layers.3.table"}
    with pytest.raises(ConfigError) as error:
        rules.of(make_mesh(4), metadata, (6, 32), "layers.3.table.weight")
    assert str(error.value) == (
        "layers.3.table.weight: axis 'vocab' of size 6 does not divide over mesh axis 'model' of size 4; choose a "
        "tensor_parallel_size that does (1, 2, 3, 6), or keep the module whole on every device with "
        "placement={'layers.*.table': 'replicate'}"
    )


def test_a_name_outside_the_glossary_and_one_mesh_axis_twice_are_refused():
    with pytest.raises(ConfigError, match="logical axis 'width' is not in the rules; known: "):
        rules.spec(("width",))
    with pytest.raises(ConfigError, match="map two axes of an array to the same mesh axis"):
        rules.spec((axes.HEADS, axes.FFN))
