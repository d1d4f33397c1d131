"""Rules that map logical axes to mesh axes, and the shardings that follow."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxinfer.errors import ConfigError
from jaxinfer.sharding import axes
from jaxinfer.sharding.policy import any_layer

RULES: Mapping[str, str | None] = {
    axes.SHARD: axes.MODEL,
    axes.HEADS: axes.MODEL,
    axes.KV_HEADS: axes.MODEL,
    axes.FFN: axes.MODEL,
    axes.VOCAB: axes.MODEL,
    axes.EXPERT: axes.MODEL,
    axes.COLUMNS: None,
    axes.EMBED: None,
    axes.HEAD_DIM: None,
    axes.BLOCKS: None,
    axes.BLOCK: None,
    axes.SLOTS: None,
}


def spec(logical: Sequence[str | None], rules: Mapping[str, str | None] = RULES) -> PartitionSpec:
    """Return the partition spec of an array with these logical axes (None: not sharded).

    Raises:
        ConfigError: an unknown logical axis, or two axes mapped to the same mesh axis.
    """
    mapped = []
    for name in logical:
        if name is not None and name not in rules:
            raise ConfigError(f"logical axis {name!r} is not in the rules; known: {sorted(rules)}")
        mapped.append(rules[name] if name is not None else None)
    used = [name for name in mapped if name is not None]
    if len(used) != len(set(used)):
        raise ConfigError(f"logical axes {tuple(logical)} map two axes of an array to the same mesh axis: {mapped}")
    return PartitionSpec(*mapped)


def sharding(
    mesh: Mesh | AbstractMesh,
    logical: Sequence[str | None],
    shape: Sequence[int],
    where: str,
    *,
    replicated: bool = False,
    module: str = "",
) -> NamedSharding:
    """Return the sharding of an array; every sharded axis must divide evenly.

    Args:
        mesh: the mesh.
        logical: logical axis names.
        shape: global shape.
        where: path of the array, for errors.
        replicated: whether the array belongs to a replicated module (`sharding.policy`), which overrides its axes.
        module: path of that module, for the remedy in errors.

    Raises:
        ConfigError: an axis is not divisible by its mesh axis; names path, axis and sizes.
    """
    if replicated:
        return NamedSharding(mesh, PartitionSpec())
    partition = spec(logical)
    for name, mesh_axis, size in zip(logical, partition, shape, strict=True):
        if mesh_axis is not None and size % mesh.shape[mesh_axis]:
            what, shards = f"axis {name!r} of size {size}", mesh.shape[mesh_axis]
            raise indivisible(where, what, shards, lambda count, n=size: n % count == 0, module=module)
    return NamedSharding(mesh, partition)


def indivisible(
    where: str, what: str, tp: int, fits: Callable[[int], bool], *, module: str = "", more: str = ""
) -> ConfigError:
    """Make the error for a size that does not divide over `tp` shards, with remedies.

    Args:
        where: the array or module.
        what: its axis and size.
        tp: shards.
        fits: whether it divides over another number of shards.
        module: path of the module that a placement could replicate.
        more: another remedy.
    """
    fitting = [str(count) for count in range(1, 65) if fits(count)]
    whole = f"keep the module whole on every device with placement={{{any_layer(module)!r}: 'replicate'}}"
    remedies = [
        f"choose a tensor_parallel_size that does ({', '.join(fitting)})",
        whole if module else "replicate its module",
        *filter(None, [more]),
    ]
    return ConfigError(
        f"{where}: {what} does not divide over mesh axis {axes.MODEL!r} of size {tp}; {', or '.join(remedies)}"
    )


def of(
    mesh: Mesh | AbstractMesh,
    metadata: Mapping[str, Any],
    shape: Sequence[int],
    where: str,
    *,
    gathered: bool = False,
) -> NamedSharding:
    """Return the sharding of a parameter from its metadata (`logical_axes`, `replicated`).

    Args:
        mesh: the mesh. If it has the axis `fsdp`, a matrix is divided over it as well, along the first axis that is not
            sharded and that its size divides; never within the columns of a fused projection.
        metadata: metadata of the parameter.
        shape: global shape.
        where: path of the parameter, for errors.
        gathered: whether to leave out `fsdp`: the sharding in which a layer takes its weights.

    Raises:
        ConfigError: see `sharding`; or no axis of a matrix divides over `fsdp`.
    """
    placed = sharding(
        mesh,
        metadata["logical_axes"],
        shape,
        where,
        replicated=metadata.get("replicated", False),
        module=metadata.get("module", ""),
    )
    return placed if gathered else _over_fsdp(placed, metadata, shape, where)


def _over_fsdp(placed: NamedSharding, metadata: Mapping[str, Any], shape: Sequence[int], where: str) -> NamedSharding:
    """Return the sharding of a parameter that is divided over the axis `fsdp` as well, if there is one."""
    count, logical = placed.mesh.shape.get(axes.FSDP, 1), metadata["logical_axes"]
    rank = len(shape) - bool(metadata.get("stacked")) - (axes.SHARD in logical)
    if count == 1 or rank < 2:  # norms, biases and scales are small
        return placed
    partition = [*placed.spec, *[None] * (len(shape) - len(placed.spec))]
    free = [i for i, name in enumerate(logical) if partition[i] is None and name != axes.COLUMNS]
    for index in free:
        if shape[index] % count == 0:
            partition[index] = axes.FSDP
            return NamedSharding(placed.mesh, PartitionSpec(*partition))
    raise ConfigError(
        f"{where}: no free axis of shape {list(shape)}, sharded as {tuple(partition)}, divides over mesh axis "
        f"{axes.FSDP!r} of size {count}; leave {axes.FSDP!r} out of axes, so that it holds replicas, or make it smaller"
    )
