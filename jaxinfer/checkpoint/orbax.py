"""Save and restore sharded weights with Orbax, one chunk per shard.

https://orbax.readthedocs.io. The folder holds a `dict` of parameters by path, which plain Orbax can read too. A
parameter whose layout is unchanged is loaded directly to its devices. Any other is split into the tensors of the
original checkpoint (`StoredSource`) and loaded by the weight table, like a checkpoint.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm.auto import tqdm

from jaxinfer.checkpoint import rules
from jaxinfer.checkpoint.manifest import REMEDY, WEIGHTS, Manifest, Stored
from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.errors import CheckpointError
from jaxinfer.sharding import rules as sharding_rules

GROUP_BYTES = 1 << 27
"""Maximum bytes of parameters restored together: their files are read concurrently, and little memory is needed in
addition to the weights."""
WRITE_REMEDY = "free space there, or convert to another folder"


def groups(params: Mapping[str, nnx.Param], most: int) -> Iterator[list[str]]:
    """Group parameter paths, in order, up to `most` bytes a group; a larger parameter forms its own group."""
    group, size = [], 0
    for path, param in params.items():
        if group and size + rules.nbytes(param) > most:
            yield group
            group, size = [], 0
        group.append(path)
        size += rules.nbytes(param)
    if group:
        yield group


def save(weights: Path, arrays: Mapping[str, jax.Array]) -> None:
    """Write some parameters of a folder that `finalize` will complete.

    Raises:
        CheckpointError: the parameters cannot be written; names the folder and the cause.
    """
    from orbax.checkpoint.experimental.v1 import partial

    with _context(), _named(f"{weights} cannot be written", WRITE_REMEDY):
        partial.save(weights.absolute(), dict(arrays))


def finalize(weights: Path) -> None:
    """Complete the folder from all calls of `save`.

    Raises:
        CheckpointError: the folder cannot be written; names the folder and the cause.
    """
    from orbax.checkpoint.experimental.v1 import partial

    with _context(), _named(f"{weights} cannot be written", WRITE_REMEDY):
        partial.finalize(weights.absolute())


def restore(
    module: nnx.Module,
    table: Sequence[Rule],
    directory: Path,
    manifest: Manifest,
    mesh: Mesh,
    *,
    progress: bool = True,
) -> None:
    """Fill an abstract module from a converted folder.

    Args:
        module: module with shapes in place of arrays.
        table: weight table of the model's family, for parameters whose layout differs.
        directory: the converted folder.
        manifest: the folder's manifest.
        mesh: mesh that the parameters are placed on.
        progress: whether a progress bar is shown.

    Raises:
        CheckpointError: files are missing or changed, or the parameters are not those of this model.
    """
    manifest.check_files(directory)
    wanted = rules.parameters(module)
    extra = sorted(set(manifest.parameters) - set(wanted))
    if extra:
        raise CheckpointError(
            f"{directory} holds {len(extra)} parameter(s) that the model of its config.json does not have: "
            f"{', '.join(extra[:8])}; {REMEDY}."
        )
    for path, param in wanted.items():
        _check_block(path, param, directory, manifest)
    source = StoredSource(directory / WEIGHTS, manifest, table)
    planned = rules.plan(wanted, table, source, directory)
    same = {path for path, param in wanted.items() if _same(path, param, mesh, manifest)}
    total = sum(map(rules.nbytes, wanted.values()))
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not progress) as bar:
        others = {path: planned[path] for path in planned if path not in same}
        quantised = None if manifest.quantization is None else source
        for arrays in (
            _direct(directory / WEIGHTS, {p: wanted[p] for p in planned if p in same}, mesh),
            rules.read(wanted, others, source, mesh, quantised),
        ):
            for path, array in arrays:
                wanted[path].set_value(array)
                bar.update(rules.nbytes(array))
    rules.update_params(module, wanted)


def _check_block(path: str, param: nnx.Param, directory: Path, manifest: Manifest) -> None:
    """Raise CheckpointError for an int8 parameter whose rotated blocks are not those that its products need."""
    stored, block = manifest.parameters.get(path), param.get_metadata().get("block", 1)
    if stored is not None and manifest.quantization is not None and stored.block != block:
        raise CheckpointError(
            f"{directory} keeps {path!r} in int8 with {stored.block} columns per rotated block, this model needs "
            f"{block}; convert the original checkpoint again with this jaxinfer, for this number of devices."
        )


def _same(path: str, param: nnx.Param, mesh: Mesh, manifest: Manifest) -> bool:
    stored = manifest.parameters.get(path)
    return stored is not None and stored.same_as(Stored.of(path, param, mesh))


def _direct(weights: Path, params: Mapping[str, nnx.Param], mesh: Mesh) -> Iterator[tuple[str, jax.Array]]:
    """Yield parameters with an unchanged layout, each shard loaded directly to its device."""
    for group in groups(params, GROUP_BYTES):
        wanted = {path: params[path] for path in group}
        yield from _load(
            weights,
            {
                path: jax.ShapeDtypeStruct(
                    tuple(param.shape),
                    param.dtype,
                    sharding=sharding_rules.of(mesh, param.get_metadata(), param.shape, path),
                )
                for path, param in wanted.items()
            },
        ).items()


def _load(weights: Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Load parameters as JAX or NumPy arrays, by the type of their templates (`ShapeDtypeStruct` or NumPy arrays)."""
    import orbax.checkpoint.experimental.v1 as ocp

    with _context(), _named(f"{weights} cannot be read", REMEDY):
        return ocp.load(weights.absolute(), dict(abstract))


class Tensor(NamedTuple):
    """Shape of a tensor of the original checkpoint."""

    shape: tuple[int, ...]


class StoredSource:
    """Source that reconstructs the tensors of the original checkpoint from the parameters of a converted folder.

    One parameter at a time is kept in host memory. Int8 parameters are read as values and scales, as in
    `checkpoint.quantised.Int8Source`.
    """

    def __init__(self, weights: Path, manifest: Manifest, table: Sequence[Rule]):
        self._weights = weights
        self._stored = manifest.parameters
        self._rules = {rule.source: rule for rule in table if rule.target in manifest.parameters and not rule.tied}
        self._scales = {stored.scales_of: path for path, stored in self._stored.items() if stored.scales_of}
        self._held: dict[str, np.ndarray] = {}
        """The most recently read parameter, by its path."""

    def names(self) -> list[str]:
        return list(self._rules)

    def info(self, name: str) -> Tensor:
        rule = self._rules[name]
        stored = self._stored[rule.target]
        stack, shape = (stored.shape[:1], stored.shape[1:]) if stored.stacked else ((), stored.shape)
        if stored.rows is None:
            shape = stored.unpadded or shape
        else:
            shape = (sum(self._rows(rule.target, part) for part in rule.parts), *shape[2:])
        return Tensor((*stack, *shape))

    def release(self) -> None:
        """Do nothing: the cached parameter is replaced when another one is read."""

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        """Read a part of a tensor; slices for all axes but the last of an int8 matrix give its row scales."""
        rule, shape = self._rules[name], self.info(name).shape
        slices = slices or tuple(map(slice, shape))
        path = self._scales.get(rule.target, rule.target) if len(slices) < len(shape) else rule.target
        values = self._values(path)
        if not self._stored[path].stacked:
            return self._part(path, rule, values, shape, slices)
        stack, *rest = slices
        return np.stack([self._part(path, rule, one, shape[1:], rest) for one in values[stack]])

    def _part(
        self, path: str, rule: Rule, values: np.ndarray, shape: Sequence[int], slices: Sequence[slice]
    ) -> np.ndarray:
        """Read a part of a tensor of this shape, or of one entry of a stack, from its parameter's `values`."""
        rows, *columns = slices
        if self._stored[path].rows is not None:
            return self._fused(path, rule, values, rows, columns)
        values, pieces = values[rows], self._stored[path].columns
        if pieces is None or not columns:
            return values[(slice(None), *columns)]
        own = slice(*columns[0].indices(shape[1]))
        made = np.zeros((values.shape[0], own.stop - own.start), values.dtype)
        for column, first, last in pieces:
            _overlap(made.T, own, values.T, column, first, last)
        return made

    def _fused(self, path: str, rule: Rule, values: np.ndarray, rows: slice, columns: Sequence[slice]) -> np.ndarray:
        """Read rows of a tensor that stacks outputs of a fused parameter."""
        values = values[(slice(None), slice(None), *columns)]
        rows = slice(*rows.indices(sum(self._rows(path, part) for part in rule.parts)))
        made = np.zeros((rows.stop - rows.start, *values.shape[2:]), values.dtype)
        offset = 0
        for part in rule.parts:
            for shard, column, first, last in self._stored[path].rows[part]:
                _overlap(made, rows, values[shard], column, offset + first, offset + last)
            offset += self._rows(path, part)
        return made

    def _rows(self, path: str, part: str) -> int:
        return max(last for _, _, _, last in self._stored[path].rows[part])

    def _values(self, path: str) -> np.ndarray:
        if path not in self._held:
            stored = self._stored[path]
            self._held = {}
            like = np.broadcast_to(np.zeros((), jnp.dtype(stored.dtype)), stored.shape)
            self._held = _load(self._weights, {path: like})
        return self._held[path]


def _overlap(made: np.ndarray, own: slice, values: np.ndarray, column: int, first: int, last: int) -> None:
    """Copy the intersection of rows `first:last`, stored from `values[column]` on, and rows `own`, stored in `made`."""
    start, stop = max(first, own.start), min(last, own.stop)
    if start < stop:
        made[start - own.start : stop - own.start] = values[column + start - first : column + stop - first]


@contextmanager
def _context() -> Iterator[None]:
    """Configure Orbax: no compression (weights barely compress, and decompression takes longer than reading), no
    copies of host arrays, partial loads.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    context = ocp.Context()
    context.array_options.saving.use_compression = False
    context.memory_options.deepcopy_host_arrays = False
    context.pytree_options.loading.partial_load = True
    with context:
        yield


@contextmanager
def _named(what: str, remedy: str) -> Iterator[None]:
    """Convert Orbax's long errors to a one-line CheckpointError; out-of-memory errors pass through."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # Orbax, TensorStore and the file system raise errors of their own
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        cause = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise CheckpointError(f"{what}: {cause.rstrip('.')}; {remedy}.") from error
