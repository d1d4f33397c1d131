"""Map checkpoint tensors to model parameters by a weight table, and load them strictly."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm.auto import tqdm

from jaxinfer.checkpoint.copying import load_param
from jaxinfer.checkpoint.packed.kept import PackedSource
from jaxinfer.checkpoint.packed.made import FP8Source
from jaxinfer.checkpoint.quantised import Int8Source
from jaxinfer.checkpoint.source import Source
from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.errors import CheckpointError


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
    int8, fp8 = int8 or int8_source(wanted, planned, source), FP8Source(source)
    for path, sources in planned.items():
        param = wanted[path]
        metadata = param.get_metadata()
        own = source
        if "packing" in metadata:
            packing = metadata["packing"]
            own = PackedSource(fp8 if packing.activations else source, metadata["packed"], packing)
        elif param.dtype == np.int8 or "scales_of" in metadata:
            own = int8
        yield path, load_param(path, param, sources, own, mesh)


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
    wanted: Mapping[str, nnx.Param],
    table: Sequence[Rule],
    source: Source,
    where: object = CHECKPOINT,
    *,
    remedy: str = "",
    incomplete: bool = False,
) -> dict[str, list[Rule]]:
    """Check all tensor names and shapes, and return the rules that fill each parameter, by its path.

    Args:
        wanted: parameters by path.
        table: weight table of the model.
        source: checkpoint to read from.
        where: checkpoint folder, for error messages.
        remedy: remedy in error messages; by default that of a folder.
        incomplete: whether tensors may be missing; their parameters are then filled in part or not at all.

    Raises:
        CheckpointError: see `load`.
    """
    names = set(source.names())
    by_name = _by_tensor(table, names)
    absent = {name: rule for name, rule in by_name.items() if rule.target is not None and name not in names}
    _check_names(by_name, names, absent, where, remedy, incomplete=incomplete)
    scales = {path: weight_of(path, param) for path, param in wanted.items() if "scales_of" in param.get_metadata()}
    planned: dict[str, list[Rule]] = {path: [] for path in wanted if path not in scales}
    for name, rule in by_name.items():
        if rule.target is None:
            continue
        if rule.target not in planned:
            raise CheckpointError(f"the weight table fills {rule.target!r}, which the model does not have")
        if name not in absent:
            _check_shape(rule, wanted[rule.target], source, where, remedy or REMEDY)
            planned[rule.target].append(rule)
    zero = {rule.target for rule in absent.values()}
    for path, filled in planned.items():
        if not incomplete and (filled or path not in zero):
            _check_whole(path, wanted[path], filled)
    return planned | {path: planned[weight] for path, weight in scales.items()}


def sources(table: Sequence[Rule], source: Source | None = None) -> dict[str, list[str]]:
    """Return the names of the tensors that fill each parameter, by its path: those that the checkpoint has, if given.

    Nothing is checked (`plan`).
    """
    names = {rule.source for rule in table} if source is None else set(source.names())
    found: dict[str, list[str]] = {}
    for name, rule in _by_tensor(table, names).items():
        if rule.target is not None:
            found.setdefault(rule.target, []).append(name)
    return found


def _by_tensor(table: Sequence[Rule], names: set[str]) -> dict[str, Rule]:
    """Return the rule of each tensor by its name in the checkpoint, or by its first name if the checkpoint lacks it."""
    by_name: dict[str, Rule] = {}
    for rule in _untied(_present(table, names), names):
        found = rule.found(names) or rule.source
        if found in by_name:
            raise CheckpointError(f"the weight table names tensor {found!r} twice")
        by_name[found] = replace(rule, source=found)
    return by_name


def _check_names(
    by_name: Mapping[str, Rule],
    names: set[str],
    absent: Mapping[str, Rule],
    where: object,
    remedy: str,
    *,
    incomplete: bool,
) -> None:
    """Refuse tensors that the model does not know, and a checkpoint that lacks some, unless it may be incomplete."""
    if extra := sorted(names - set(by_name)):
        raise CheckpointError(
            f"{where} has {len(extra)} tensor(s) this model does not know: {format_names(extra)}; {remedy or REMEDY}"
        )
    missing = sorted(name for name, rule in absent.items() if not rule.optional)
    if missing and not incomplete:
        remedy = remedy or (UNTIED if all(name.endswith(HEADS) for name in missing) else REMEDY)
        raise CheckpointError(
            f"{where} lacks {len(missing)} tensor(s) of this model: {format_names(missing)}; {remedy}"
        )


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


def weight_of(path: str, scales: nnx.Param) -> str:
    """Return the path of the quantised weight that these scales or zero points belong to."""
    return ".".join([*path.split(".")[:-1], scales.get_metadata()["scales_of"]])


def format_names(names: Sequence[str], most: int = 8) -> str:
    """Format the first `most` names of a list and the number of the remaining ones."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _check_shape(rule: Rule, param: nnx.Param, source: Source, where: object, remedy: str) -> None:
    metadata = param.get_metadata()
    stack, shape = (param.shape[:1], param.shape[1:]) if metadata.get("stacked") else ((), tuple(param.shape))
    if rule.parts:
        rows = {output.name: output.rows for output in metadata["outputs"]}
        expected = (sum(rows[part] for part in rule.parts), *shape[2:])
    else:
        expected = metadata.get("unpadded") or shape
    if rule.index is None:
        expected = (*stack, *expected)
    if "packing" in metadata:
        expected = (*expected[:-1], expected[-1] * metadata["packing"].codes)
    found = tuple(source.info(rule.source).shape)
    if found != expected:
        raise CheckpointError(
            f"{where}: tensor {rule.source!r}: expected shape {list(expected)}, found {list(found)}; {remedy}"
        )
