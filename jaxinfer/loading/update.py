"""Replace and return the weights of a running engine, under the names of a checkpoint or of the engine's module.

Tensors under Hugging Face names go through the weight table that reads checkpoints (`checkpoint.rules.plan`), and
are fused on the devices (`loading.fuse_programs`). Everything about them is checked, and every program compiled, before
the first parameter is replaced. The parameters are then replaced one at a time, so that the memory of one of them is
all that is needed beside the weights and the tensors given.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer.checkpoint import fusing, naming, rules, ties
from jaxinfer.checkpoint.fusing import Layout
from jaxinfer.checkpoint.rules import format_names
from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.functional import Program
from jaxinfer.layers.adapters import AdapterWeight
from jaxinfer.loading import checksum
from jaxinfer.loading.fuse_programs import ArraySource, FusePrograms, Job, Step, put
from jaxinfer.models import registry
from jaxinfer.models.base import Family

HF, JAXINFER = "hf", "jaxinfer"
"""Names under which weights are given: those of transformers, or the paths of the engine's own module."""
WHERE = "the update"
REMEDY = "LLM.weights() gives the names, shapes and dtypes of this model"
INCOMPLETE = f"{REMEDY}; partial=True replaces only what is given"
FLOATS = ("float32", "bfloat16", "float16")
"""Dtypes from which a matrix is quantised."""

Arrays = Mapping[str, Any]
"""JAX or NumPy arrays by name."""


@dataclass(frozen=True)
class WeightUpdate:
    """Summary of a call of `LLM.update_weights`."""

    tensors: int
    """Number of tensors given that the model reads."""
    nbytes: int
    """Size of these tensors in bytes, in the dtypes that were passed."""
    checksum: str
    """Checksum of these tensors in the engine's dtypes (`loading.checksum`)."""
    version: int = 0
    """Version of the weights after the update (`LLM.weight_version`)."""


@dataclass(frozen=True)
class Checked:
    """An update whose names, shapes and dtypes are right; its values are not read yet."""

    arrays: Arrays
    dtypes: Mapping[str, np.dtype]
    """Dtypes in which the engine takes the values of arrays, by their names."""
    tied: Sequence[tuple[str, str]] = ()
    """Names of arrays that must be equal."""
    placed: dict[int, Any] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    """Parameters given in the engine's own form, and those to be made of tensors, as in `Prepared`."""

    @property
    def facts(self) -> str:
        """Digest of all names, shapes and dtypes, and of which arrays lie in several processes, to be compared."""
        found = sorted(
            (name, tuple(array.shape), str(array.dtype), getattr(array, "is_fully_addressable", True))
            for name, array in self.arrays.items()
        )
        return hashlib.sha256(repr(found).encode()).hexdigest()


@dataclass(frozen=True)
class Prepared:
    """A checked update."""

    report: WeightUpdate
    placed: dict[int, Any] = field(default_factory=dict)
    """Parameters given in the engine's own form, by index."""
    jobs: list[tuple[Job, list[Step]]] = field(default_factory=list)
    """Parameters to be made of tensors, with the compiled programs that make them."""


class WeightTable:
    """Converter between an engine's parameters and tensors under Hugging Face names or module paths.

    Args:
        program: static part of the module.
        params: its parameters or their shapes; only shapes, dtypes and shardings are kept.
    """

    def __init__(self, program: Program, params: Sequence[Any]):
        self._program, self._programs = program, FusePrograms(program.mesh)
        self._specs = [jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding) for p in params]
        self.module = program.module(self._specs)
        """The module with shapes in place of arrays."""
        self._params = rules.parameters(self.module)
        self._places = program.places(nnx.Not(AdapterWeight))
        scales = {path: param for path, param in self._params.items() if "scales_of" in param.get_metadata()}
        self._scales = {rules.weight_of(path, param): path for path, param in scales.items()}
        packings = ((path, param.get_metadata().get("packing")) for path, param in self._params.items())
        self._packed = {path: packing for path, packing in packings if packing is not None}
        self._found: tuple[Family, Sequence[Rule]] | None = None

    def prepare(self, tree: Any, *, partial: bool = False, cast: bool = False) -> Prepared:
        """Check an update and its values; arguments and errors are those of `LLM.update_weights`."""
        return self.inspect(self.check(tree, partial=partial, cast=cast))

    def check(self, tree: Any, *, partial: bool = False, cast: bool = False) -> Checked:
        """Check names, shapes and dtypes of an update; arguments and errors are those of `LLM.update_weights`."""
        if isinstance(tree, nnx.Module):
            tree = nnx.state(tree)
        if isinstance(tree, nnx.State):
            state = {_path(path): value for path, value in nnx.to_flat_state(tree)}
            return self._check_state({name: _as_array(name, value) for name, value in state.items()}, partial, cast)
        if not isinstance(tree, Mapping) or not tree or not all(isinstance(name, str) for name in tree):
            raise TypeError(
                "update_weights: weights must be an NNX module, its nnx.state, or a dict of Hugging Face names to "
                f"arrays with at least one entry, got {type(tree).__name__}"
            )
        return self._check_named({name: _as_array(name, value) for name, value in tree.items()}, partial, cast)

    def _check_state(self, arrays: Arrays, partial: bool, cast: bool) -> Checked:
        """Check parameters by their paths in the engine's module."""
        unknown, missing = sorted(arrays.keys() - self._places), sorted(self._places.keys() - arrays)
        if unknown:
            raise CheckpointError(
                f"{WHERE} has {len(unknown)} parameter(s) this model does not know: {format_names(unknown)}; {REMEDY}"
            )
        if missing and not partial:
            raise CheckpointError(f"{WHERE} lacks {len(missing)} parameter(s): {format_names(missing)}; {INCOMPLETE}")
        dtypes = {}
        for path, array in arrays.items():
            wanted = self._specs[self._places[path]]
            if tuple(array.shape) != wanted.shape:
                raise CheckpointError(
                    f"{WHERE}: parameter {path!r}: expected shape {list(wanted.shape)}, found {list(array.shape)}; "
                    f"{REMEDY}"
                )
            dtypes[path] = _check_dtype(path, array.dtype, (np.dtype(wanted.dtype).name,), cast)
        return Checked(arrays, dtypes, placed={self._places[path]: array for path, array in arrays.items()})

    def _check_named(self, arrays: Arrays, partial: bool, cast: bool) -> Checked:
        """Check tensors by their Hugging Face names."""
        family, table = self._family()
        for name in set(naming.known_names(table)).intersection(arrays):
            if not jnp.issubdtype(arrays[name].dtype, jnp.floating):
                _check_dtype(name, arrays[name].dtype, FLOATS, cast)
        source = naming.rename_tensors(family.source(ArraySource(arrays)), table, WHERE, family.ignored)
        planned = rules.plan(
            self._params, table, source, WHERE, remedy=REMEDY if partial else INCOMPLETE, incomplete=partial
        )
        packed = [name for name in source.names() if source.original(name) not in arrays]
        if packed:
            raise CheckpointError(
                f"{WHERE}: {format_names(packed)} is in MXFP4; pass it in one of the dtypes {', '.join(FLOATS)}, to an "
                "engine loaded with quantization='dequantize'"
            )
        given = {name: arrays[source.original(name)] for name in source.names()}
        jobs, dtypes = [], {}
        for path, filled in planned.items():
            if partial and not filled:
                continue
            packing = self._packed.get(path)
            if packing is not None and not packing.activations:
                raise CheckpointError(
                    f"{WHERE}: {filled[0].source!r} is kept in {packing.bits} bits, to which a new value would have to "
                    "be rounded; load with quantization='dequantize' to replace it"
                )
            if path in self._scales.values():
                continue
            layout = Layout.of(self._params[path])
            wanted = FLOATS if layout.quantised else (layout.dtype.name,)
            for rule in filled:
                dtypes[rule.source] = _check_dtype(rule.source, given[rule.source].dtype, wanted, cast)
            places = [self._places[own] for own in (path, self._scales.get(path)) if own is not None]
            specs = [self._specs[place] for place in places]
            jobs.append(Job(places, specs, layout, filled, [given[rule.source] for rule in filled]))
        tied = [(rule.source, other) for rule, other in ties.pairs(table, set(given))]
        dtypes |= {name: dtypes[other] for name, other in tied}
        return Checked(given, dtypes, tied, jobs=jobs)

    def inspect(self, checked: Checked) -> Prepared:
        """Check the values of an update, and compile the programs that it needs; raises as `LLM.update_weights`.

        With several processes, all of them must call it.
        """
        report = _inspect(checked.arrays, checked.dtypes, checked.tied)
        jobs = [(job, self._programs.steps(job, self._family()[0])) for job in checked.jobs]
        return Prepared(report, checked.placed, jobs)

    def apply(self, prepared: Prepared, params: list[Any]) -> None:
        """Replace parameters in the list, one at a time."""
        for place, array in sorted(prepared.placed.items()):  # in the same order in all processes
            wanted = self._specs[place]
            params[place] = put(array, wanted.sharding).astype(wanted.dtype)
        for job, steps in prepared.jobs:
            self._programs.make(job, steps, params)

    def tensors(self, params: Sequence[jax.Array]) -> Iterator[tuple[str, jax.Array]]:
        """Yield the weights by their Hugging Face names, on the devices, those of one parameter at a time.

        Raises:
            ConfigError: the weights are quantised, or the module does not name its architecture.
        """
        family, table = self._family()
        if self._scales:
            kept = min(self._scales)
            packing = self._packed.get(kept)
            what = f"quantised to {'int8' if packing is None else 'fp8'}, and their original values are not kept"
            if packing is not None and not packing.activations:
                what = f"in {packing.bits} bits"
            raise ConfigError(
                f"weights: {kept!r} and others are {what}; weights(names='jaxinfer') gives the engine's own values and "
                "their scales"
            )
        for path, (layout, filled) in fusing.named(self._params, table).items():
            found = self._programs.take_apart(layout, filled, family, params[self._places[path]])
            yield from zip((rule.source for rule in filled), found, strict=True)

    def checksum(self, params: Sequence[jax.Array]) -> str:
        """Return the checksum of the weights by their Hugging Face names; raises as `tensors`."""
        found, specs = {}, {}
        for name, tensor in self.tensors(params):
            found |= checksum.sums({name: tensor})
            specs[name] = jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
        return checksum.combine(specs, found)

    def state(self, params: Sequence[jax.Array]) -> Any:
        """Return the weights in the engine's own form: the state of its module."""
        return nnx.filter_state(jax.tree.unflatten(self._program.tree, params), nnx.Not(AdapterWeight))

    def _family(self) -> tuple[Family, Sequence[Rule]]:
        """Return the model's family and its weight table; raises as `registry.family_of`."""
        if self._found is None:
            family = registry.family_of(self.module, "weights by Hugging Face names")
            self._found = family, family.weight_rules(self.module.config)
        return self._found


def _path(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def _as_array(name: str, value: Any) -> Any:
    """Return a value as an array of NumPy or JAX, without a copy."""
    if isinstance(value, nnx.Variable):
        value = value.get_value()
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
        if value.is_deleted():
            raise CheckpointError(f"{WHERE}: {name!r} is an array that was deleted or donated; pass it again")
        return value
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "__dlpack__") and not isinstance(value, jax.core.Tracer):
        return jax.dlpack.from_dlpack(value)
    raise TypeError(f"update_weights: {name!r} must be an array of JAX or NumPy, got {type(value).__name__}")


def _check_dtype(name: str, found: Any, wanted: Sequence[str], cast: bool) -> np.dtype:
    """Return the dtype in which the engine takes a tensor's values.

    Raises:
        CheckpointError: values would be rounded and not `cast`, they are not floating-point numbers, or the engine has
            codes, which have no values without their scales.
    """
    found = np.dtype(found)
    if found.name in wanted:
        return found
    if wanted[0] not in FLOATS:
        raise CheckpointError(
            f"{WHERE}: {name!r}: expected codes of dtype {wanted[0]}, found {found.name}; give the weights by the "
            "names of Hugging Face, or load the engine without quantization"
        )
    if jnp.issubdtype(found, jnp.floating) and (cast or found.name in FLOATS[1:] and wanted[0] == FLOATS[0]):
        return np.dtype(wanted[0])
    remedy = "pass cast=True to round it, or convert it" if jnp.issubdtype(found, jnp.floating) else "convert it"
    raise CheckpointError(f"{WHERE}: {name!r}: expected dtype {' or '.join(wanted)}, found {found.name}; {remedy}")


def _inspect(arrays: Arrays, dtypes: Mapping[str, np.dtype], tied: Sequence[tuple[str, str]] = ()) -> WeightUpdate:
    """Check that all values are finite in the engine's dtypes and tied tensors equal, and sum all of them up.

    Raises:
        CheckpointError: they are not.
    """
    found = checksum.sums(arrays, dtypes)
    for name, sums in found.items():
        if sums.not_finite:
            raise CheckpointError(
                f"{WHERE}: {name!r}: expected finite values, found {sums.not_finite} that are NaN or infinite in "
                f"{np.dtype(dtypes.get(name, arrays[name].dtype)).name}"
            )
    for name, other in tied:
        if (arrays[name].shape, found[name]) != (arrays[other].shape, found[other]):
            raise CheckpointError(
                f"{WHERE}: {name!r} and {other!r} differ, and are one parameter in this engine (tie_word_embeddings); "
                "load a checkpoint in which they differ to have both"
            )
    size = sum(array.size * array.dtype.itemsize for array in arrays.values())
    return WeightUpdate(len(arrays), size, checksum.combine(arrays, found, dtypes))
