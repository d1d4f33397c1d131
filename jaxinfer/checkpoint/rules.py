"""Map checkpoint tensors to model parameters by a weight table, and load them strictly."""

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm.auto import tqdm

from jaxinfer.checkpoint.quantised import Int8Source
from jaxinfer.checkpoint.source import Info, Source
from jaxinfer.errors import CheckpointError
from jaxinfer.sharding import rules as sharding_rules

ALIGNMENT = 64
"""Alignment in bytes: JAX on CPU adopts a NumPy buffer that starts at a multiple of this, and copies any other."""
COPY_ELEMENTS = 1 << 21
"""Elements copied from the file at a time: 8 MiB of float32, the dtype in which they are quantised."""


@dataclass(frozen=True)
class Rule:
    """Mapping of one checkpoint tensor to a parameter, or to some rows of a fused or stacked one."""

    source: str
    """Tensor name in the checkpoint; `{i}` stands for the layer index."""
    target: str | None
    """Path of the parameter to fill; None for a known tensor that the model does not need."""
    parts: tuple[str, ...] = ()
    """Outputs of a fused parameter whose rows the tensor stacks, in its order."""
    also: tuple[str, ...] = ()
    """Alternative names of the tensor; a checkpoint holds it under only one of its names."""
    index: int | None = None
    """Index of the tensor in a stacked parameter; None if the tensor itself is the whole stack."""
    instead: tuple["Rule", ...] = ()
    """Rules of the tensors that hold the same values in checkpoints without this one (`models.moe_rules`)."""
    tied: str = ""
    """Name that `Family.untie` has for the tie, for a tensor that config.json ties to the target's own
    (`checkpoint.ties`)."""
    optional: bool = False
    """Whether a checkpoint may omit the tensor; its parameter is then zero."""

    def of_layer(self, i: int) -> "Rule":
        """Return the rule with `{i}` replaced by the layer index."""
        source, *also = (name.replace("{i}", str(i)) for name in (self.source, *self.also))
        target = None if self.target is None else self.target.replace("{i}", str(i))
        instead = tuple(rule.of_layer(i) for rule in self.instead)
        return replace(self, source=source, target=target, also=tuple(also), instead=instead)

    def found(self, names: Container[str]) -> str | None:
        """Return the tensor's name in a checkpoint, or None if the checkpoint has none of its names."""
        return next((name for name in (self.source, *self.also) if name in names), None)


def expand(table: Iterable[Rule], layers: int) -> list[Rule]:
    """Return the table with `{i}` expanded for every layer."""
    return [rule.of_layer(i) for rule in table for i in (range(layers) if "{i}" in rule.source else (0,))]


def parameters(module: nnx.Module) -> dict[str, nnx.Param]:
    """Return the parameters of a module (arrays or abstract shapes) by dotted path."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): param for path, param in flat}


CHECKPOINT = "the checkpoint"
"""Description of the checkpoint in error messages when its folder is not known."""
REMEDY = "the weights are incomplete, or config.json is another model's: fetch both again"
HEADS = ("lm_head.weight", "proj_out.weight")
UNTIED = (
    "config.json says that the head is not tied to the embedding (tie_word_embeddings), or the family never ties it. "
    "Where they are tied pass hf_overrides={'tie_word_embeddings': True}; else the weights are incomplete: fetch them "
    "again"
)


def load(
    module: nnx.Module,
    table: Sequence[Rule],
    source: Source,
    mesh: Mesh,
    *,
    progress: bool = True,
    where: object = CHECKPOINT,
) -> None:
    """Fill an abstract module from a checkpoint, tensor by tensor; each device's shard is read separately.

    The weight table is checked against the checkpoint before any data is read.

    Args:
        module: abstract module, whose parameters have shapes only.
        table: weight table of the model.
        source: checkpoint to read from.
        mesh: device mesh of the parameters.
        progress: whether to show a progress bar.
        where: checkpoint folder, for error messages.

    Raises:
        CheckpointError: a tensor is missing, unknown or of the wrong shape; names it, with the expected and found
            shapes.
    """
    wanted = parameters(module)
    total = sum(map(nbytes, wanted.values()))
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not progress) as bar:
        for path, array in read(wanted, plan(wanted, table, source, where), source, mesh):
            wanted[path].set_value(array)
            bar.update(nbytes(array))
    update_params(module, wanted)


def read(
    wanted: Mapping[str, nnx.Param],
    planned: Mapping[str, list[Rule]],
    source: Source,
    mesh: Mesh,
    int8: Source | None = None,
) -> Iterator[tuple[str, jax.Array]]:
    """Yield the parameters of a `plan` as sharded arrays, one at a time without keeping them.

    Args:
        wanted: abstract parameters by path.
        planned: result of `plan`.
        source: checkpoint to read from.
        mesh: device mesh of the parameters.
        int8: source of int8 matrices and their row scales (`Int8Source`); by default made from `source`.
    """
    int8 = int8 or int8_source(wanted, planned, source)
    for path, sources in planned.items():
        param = wanted[path]
        quantised = param.dtype == np.int8 or "scales_of" in param.get_metadata()
        yield path, _place(path, param, sources, int8 if quantised else source, mesh)


def int8_source(wanted: Mapping[str, nnx.Param], planned: Mapping[str, list[Rule]], source: Source) -> Int8Source:
    """Create the source of int8 matrices and scales for the parameters of a `plan`."""
    quantised = {path: filled for path, filled in planned.items() if wanted[path].dtype == np.int8}
    blocks = {
        rule.source: wanted[path].get_metadata()["block"] for path, filled in quantised.items() for rule in filled
    }
    return Int8Source(source, blocks)


def update_params(module: nnx.Module, filled: Mapping[str, nnx.Param]) -> None:
    """Update a module with loaded parameters."""
    nnx.update(module, nnx.from_flat_state([(_key(path), param) for path, param in filled.items()]))


def _key(path: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in path.split("."))


def nbytes(param: nnx.Param | jax.Array | jax.ShapeDtypeStruct) -> int:
    """Return the size of a parameter in bytes; replicas are counted once."""
    return math.prod(param.shape) * np.dtype(param.dtype).itemsize


def plan(
    wanted: Mapping[str, nnx.Param], table: Sequence[Rule], source: Source, where: object = CHECKPOINT
) -> dict[str, list[Rule]]:
    """Check all tensor names and shapes, and return the rules that fill each parameter, by its path.

    Raises:
        CheckpointError: see `load`.
    """
    by_name: dict[str, Rule] = {}
    names = set(source.names())
    for rule in _untied(_present(table, names), names):
        found = rule.found(names) or rule.source
        if found in by_name:
            raise CheckpointError(f"the weight table names tensor {found!r} twice")
        by_name[found] = replace(rule, source=found)
    extra = sorted(names - set(by_name))
    if extra:
        raise CheckpointError(
            f"{where} has {len(extra)} tensor(s) this model does not know: {format_names(extra)}; {REMEDY}"
        )
    absent = {name: rule for name, rule in by_name.items() if rule.target is not None and name not in names}
    missing = sorted(name for name, rule in absent.items() if not rule.optional)
    if missing:
        remedy = UNTIED if all(name.endswith(HEADS) for name in missing) else REMEDY
        raise CheckpointError(
            f"{where} lacks {len(missing)} tensor(s) of this model: {format_names(missing)}; {remedy}"
        )
    scales = {path: _sibling(path, param) for path, param in wanted.items() if "scales_of" in param.get_metadata()}
    planned: dict[str, list[Rule]] = {path: [] for path in wanted if path not in scales}
    for name, rule in by_name.items():
        if rule.target is None:
            continue
        if rule.target not in planned:
            raise CheckpointError(f"the weight table fills {rule.target!r}, which the model does not have")
        if name not in absent:
            _check_shape(rule, wanted[rule.target], source, where)
            planned[rule.target].append(rule)
    zero = {rule.target for rule in absent.values()}
    for path, filled in planned.items():
        if filled or path not in zero:
            _check_whole(path, wanted[path], filled)
    return planned | {path: planned[weight] for path, weight in scales.items()}


def _present(table: Sequence[Rule], names: set[str]) -> Iterator[Rule]:
    """Yield the rules that apply to this checkpoint, with `instead` rules in place of tensors that it lacks."""
    for rule in table:
        absent = rule.instead and names.isdisjoint((rule.source, *rule.also))
        yield from _present(rule.instead, names) if absent else (rule,)


def _untied(table: Iterable[Rule], names: set[str]) -> Iterator[Rule]:
    """Yield the rules with ties resolved: among tensors tied to one parameter, the first that is present fills it."""
    table = list(table)
    tied = {rule.target for rule in table if rule.tied}
    filled: set[str | None] = set()
    for rule in sorted(table, key=lambda rule: bool(rule.tied)):
        if rule.target not in tied:
            yield rule
        elif rule.found(names) and rule.target not in filled:
            filled.add(rule.target)
            yield replace(rule, tied="")
        elif rule.found(names):
            yield replace(rule, target=None)
    yield from (rule for rule in table if rule.target in tied - filled and not rule.tied)


def _check_whole(path: str, param: nnx.Param, filled: Sequence[Rule]) -> None:
    """Check that the rules fill every output of a parameter, and of each entry of a stack, exactly once."""
    metadata = param.get_metadata()
    outputs = [output.name for output in metadata.get("outputs", ())] or [""]
    stack = range(param.shape[0]) if metadata.get("stacked") else (None,)
    found: Counter[tuple[int | None, str]] = Counter()
    for rule in filled:
        for index in stack if rule.index is None else (rule.index,):
            found.update((index, part) for part in rule.parts or ("",))
    if found != Counter((index, name) for index in stack for name in outputs):
        sources = format_names([rule.source for rule in filled]) or "nothing"
        raise CheckpointError(f"the weight table fills {path!r} from {sources}, not wholly or not once")


def _sibling(path: str, scales: nnx.Param) -> str:
    """Return the path of the int8 weight that these row scales belong to."""
    return ".".join([*path.split(".")[:-1], scales.get_metadata()["scales_of"]])


def format_names(names: Sequence[str], most: int = 8) -> str:
    """Format the first `most` names of a list and the number of the remaining ones."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _check_shape(rule: Rule, param: nnx.Param, source: Source, where: object) -> None:
    metadata = param.get_metadata()
    stack, shape = (param.shape[:1], param.shape[1:]) if metadata.get("stacked") else ((), tuple(param.shape))
    if rule.parts:
        rows = {output.name: output.rows for output in metadata["outputs"]}
        expected = (sum(rows[part] for part in rule.parts), *shape[2:])
    else:
        expected = metadata.get("unpadded") or shape
    if rule.index is None:
        expected = (*stack, *expected)
    found = tuple(source.info(rule.source).shape)
    if found != expected:
        raise CheckpointError(
            f"{where}: tensor {rule.source!r}: expected shape {list(expected)}, found {list(found)}; {REMEDY}"
        )


def _place(path: str, param: nnx.Param, filled: list[Rule], source: Source, mesh: Mesh) -> jax.Array:
    """Load a parameter as one sharded array; each device's shard is read separately."""
    metadata = param.get_metadata()
    placed = sharding_rules.of(mesh, metadata, param.shape, path)

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        own = [slice(*i.indices(n)) for i, n in zip(index, param.shape, strict=True)]
        made = _aligned([i.stop - i.start for i in own], np.dtype(param.dtype))
        if not filled:
            return made
        if not metadata.get("stacked"):
            _copy_param(made, own, tuple(param.shape), metadata, filled, source)
            return made
        stack, *rest = own
        for one, number in zip(made, range(stack.start, stack.stop), strict=True):
            alone = [rule for rule in filled if rule.index == number]
            parts = (alone, source) if alone else (filled, StackEntry(source, number))
            _copy_param(one, rest, tuple(param.shape[1:]), metadata, *parts)
        return made

    return jax.make_array_from_callback(tuple(param.shape), placed, shard)


class StackEntry:
    """Source that presents one entry of stacked tensors."""

    def __init__(self, source: Source, number: int):
        self._source, self._number = source, number

    def names(self) -> list[str]:
        return self._source.names()

    def info(self, name: str) -> Info:
        return self._source.info(name)

    def release(self) -> None:
        self._source.release()

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        """Read the entry, or the part selected by slices of its own axes."""
        return self._source.read(name, (slice(self._number, self._number + 1), *(slices or ())))[0]


def _copy_param(
    made: np.ndarray,
    own: Sequence[slice],
    shape: tuple[int, ...],
    metadata: Mapping[str, Any],
    filled: list[Rule],
    source: Source,
) -> None:
    """Fill the slices `own` of a parameter of this shape, or of one entry of a stack."""
    if "outputs" not in metadata:
        return _copy_plain(made, own, shape, metadata, filled[0].source, source)
    for part, number in zip(made, range(own[0].start, own[0].stop), strict=True):
        _copy_fused(part, metadata["outputs"], number, shape[0], filled, source)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Allocate zeros at an address that JAX on CPU adopts without a copy, so that a weight is never in memory twice."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(target: np.ndarray, source: Source, name: str, part: Sequence[slice]) -> None:
    """Copy a part of a tensor to the start of `target`, a few rows at a time.

    Copies are required, since the file may be replaced while the weights are in use. File pages that were read count as
    memory of this process until they are released.
    """
    rows, *others = part
    step = max(1, COPY_ELEMENTS * target.shape[0] // max(1, target.size))
    for first in range(rows.start, rows.stop, step):
        piece = source.read(name, (slice(first, min(first + step, rows.stop)), *others))
        at = (first - rows.start, *[0] * len(others))
        target[tuple(slice(start, start + n) for start, n in zip(at, piece.shape, strict=True))] = piece
        source.release()


def _copy_plain(
    target: np.ndarray,
    own: Sequence[slice],
    shape: tuple[int, ...],
    metadata: Mapping[str, Any],
    name: str,
    source: Source,
) -> None:
    """Fill the slices `own` of a parameter that comes from one tensor; padding stays zero."""
    bounds = metadata.get("unpadded") or shape
    part = [slice(i.start, min(i.stop, n)) for i, n in zip(own, bounds)]
    if "inputs" not in metadata:
        return _copy(target, source, name, part)
    width = own[1].stop - own[1].start
    for piece in metadata["inputs"].pieces(own[1].start // width, shape[1] // width):
        into = target[:, piece.column : piece.column + piece.stop - piece.start]
        _copy(into, source, name, [part[0], slice(piece.start, piece.stop)])


def _copy_fused(target: np.ndarray, outputs: Sequence, shard: int, tp: int, filled: list[Rule], source: Source) -> None:
    """Fill one shard `[columns, in]` of a fused parameter: the shard's rows of each output, in sequence."""
    found = {}
    sizes = {output.name: output.rows for output in outputs}
    for rule in filled:
        offset = 0
        for part in rule.parts:
            found[part] = (rule.source, offset)
            offset += sizes[part]
    column = 0
    for output in outputs:
        name, offset = found[output.name]
        for piece in output.pieces(shard, tp):
            at, rows = column + piece.column, slice(offset + piece.start, offset + piece.stop)
            _copy(target[at : at + rows.stop - rows.start], source, name, [rows, *map(slice, target.shape[1:])])
        column += output.columns(tp)
