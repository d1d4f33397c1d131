"""LoRA adapters of a running engine: read, checked, and placed in the slots of the model's projections.

An adapter's matrices find their projection by the weight table that reads checkpoints. A change of a slot makes the
arrays of the projections that it touches anew, from the matrices of all slots on the host: nothing is compiled, and
steps that run keep the arrays that they have.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from jaxinfer._utils.checks import describe
from jaxinfer.adapter import Adapter
from jaxinfer.checkpoint import naming, peft
from jaxinfer.checkpoint.copying import load_param
from jaxinfer.checkpoint.peft import Matrices
from jaxinfer.checkpoint.rules import format_names
from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.config import EngineConfig
from jaxinfer.distributed.group import Group
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.functional import Program
from jaxinfer.layers import adapters as layers
from jaxinfer.layers.adapters import FusedAdapters, RowAdapters
from jaxinfer.layers.embedding import Embedding
from jaxinfer.loading.fuse_programs import ArraySource
from jaxinfer.models import registry
from jaxinfer.models.base import LanguageModel

DEFAULT = 4
"""`max_adapters` where adapters are given and it is not."""
OUT = "out"
"""Name of the only output of a row-parallel projection."""


@dataclass(frozen=True)
class Placed:
    """Matrices of an adapter for one output of a projection."""

    a: np.ndarray
    """`[r, in]`."""
    b: np.ndarray
    """`[out, r]`, scaled."""


Held = Mapping[tuple[str, str], Placed]
"""An adapter's matrices by the path of the projection and the name of its output."""


@dataclass(frozen=True)
class Prepared:
    """A checked adapter."""

    adapter: Adapter
    held: Held = field(repr=False)


def with_adapters(
    config: EngineConfig, adapters: Mapping[str, Any] | None, group: Group | None, replicas: int = 1
) -> EngineConfig:
    """Return the settings with `max_adapters` chosen for the adapters that are given.

    Raises:
        TypeError: the adapters are no mapping.
        ConfigError: there are more than `max_adapters`, or several processes or replicas serve the model.
    """
    if adapters is not None and not isinstance(adapters, Mapping):
        raise TypeError(f"adapters must map names to folders or Hub ids, got {describe(adapters)}")
    most = config.max_adapters
    if most is None:
        most = 0 if adapters is None else max(DEFAULT, len(adapters))
    if len(adapters or ()) > most:
        raise ConfigError(f"there are {len(adapters)} adapters, and max_adapters is {most}; raise it, or pass fewer")
    if most and (group is not None or replicas > 1):
        where = "several processes serve one model" if replicas == 1 else f"axes has 'data' ({replicas} replicas)"
        raise ConfigError(
            f"max_adapters is {most}, but adapters are not supported where {where}; merge the adapter into the model "
            "(PeftModel.merge_and_unload)"
        )
    return replace(config, max_adapters=most)


def extended(module: LanguageModel, config: EngineConfig, mesh: Mesh) -> LanguageModel:
    """Return a module with room for adapters, all zeros, which shares its other arrays with the given one.

    Raises:
        ConfigError: the model cannot have adapters.
    """
    if not config.max_adapters:
        return module
    module = nnx.merge(*nnx.split(module))
    add_room(module, config, mesh)
    for path, part in layers.parts(module).items():
        for name, weight in _weights(part):
            weight.set_value(load_param(f"{path}.{name}", weight, [], ArraySource({}), mesh))
    return module


def add_room(module: LanguageModel, config: EngineConfig, mesh: Mesh | AbstractMesh) -> None:
    """Add adapters without values to a module, if the settings want any; raises as `extended`."""
    if not config.max_adapters:
        return
    if module.config.cross is not None:
        raise ConfigError(
            f"max_adapters is {config.max_adapters}, but adapters of models with cross-attention are not "
            "supported; merge the adapter into the model instead (PeftModel.merge_and_unload)"
        )
    layers.add(module, mesh, slots=config.max_adapters, rank=config.max_adapter_rank, dtype=_dtype(module))


def _dtype(module: LanguageModel) -> jnp.dtype:
    """Return the dtype of the hidden states."""
    [embedding, *_] = [part for _, part in nnx.iter_modules(module) if isinstance(part, Embedding) and part.lookup]
    own = jnp.dtype(embedding.weight.dtype)
    return own if jnp.issubdtype(own, jnp.floating) else jnp.dtype(embedding.dtype)


def _weights(part: FusedAdapters | RowAdapters) -> list[tuple[str, layers.AdapterWeight]]:
    return [(name, value) for name, value in vars(part).items() if isinstance(value, layers.AdapterWeight)]


class AdapterTable:
    """Adapters of an engine by name.

    Args:
        program: static part of the module.
        module: the module with shapes in place of arrays.
        config: engine settings.
    """

    def __init__(self, program: Program, module: LanguageModel, config: EngineConfig):
        self._mesh, self._module, self._rank = program.mesh, module, config.max_adapter_rank
        places = program.places(layers.AdapterWeight)
        self._parts = layers.parts(module)
        self._places = {
            path: {name: places[f"{path}.adapters.{name}"] for name, _ in _weights(part)}
            for path, part in self._parts.items()
        }
        self._slots: list[Held] = [{}] * (config.max_adapters or 0)
        self._rules: dict[str, Rule] | None = None
        self.by_name: dict[str, Adapter] = {}
        """The adapters there are."""

    def prepare(self, name: Any, given: Any, config: Mapping[str, Any] | None) -> Prepared:
        """Read and check an adapter; arguments and errors are those of `LLM.add_adapter`."""
        if not isinstance(name, str) or not name:
            raise TypeError(f"add_adapter: name must be a string that is not empty, got {name!r}")
        where = f"adapter {name!r}"
        slot = self._free(name)
        held, content = {}, hashlib.sha256()
        matrices = peft.read(given, config, where)
        for module, own in matrices.items():
            for target, placed in self._targets(module, own, where):
                held[target] = placed
                content.update(f"{target} {placed.a.shape} {placed.b.shape} {placed.a.dtype} ".encode())
                content.update(placed.a.tobytes() + placed.b.tobytes())
        rank = max(own.rank for own in matrices.values())
        return Prepared(Adapter(name, slot, rank, len(matrices), content.digest()), held)

    def _free(self, name: str) -> int:
        """Return a free slot.

        Raises:
            ConfigError: the engine takes no adapters, or no more.
            ValueError: the name is in use.
        """
        if not self._slots:
            raise ConfigError("this LLM takes no adapters; make it with adapters={name: folder} or max_adapters=N")
        if name in self.by_name:
            raise ValueError(f"adapter {name!r} is there already; remove_adapter it first, or choose another name")
        taken = {adapter.slot for adapter in self.by_name.values()}
        free = [slot for slot in range(len(self._slots)) if slot not in taken]
        if not free:
            raise ConfigError(
                f"adapter {name!r}: there are {len(taken)} adapters, and max_adapters is {len(self._slots)}; remove "
                f"one of {', '.join(map(repr, self.by_name))}, or make the LLM with a larger max_adapters"
            )
        return free[0]

    def _targets(self, module: str, own: Matrices, where: str) -> list[tuple[tuple[str, str], Placed]]:
        """Return the matrices of each output that a linear layer of the checkpoint is."""
        rule = self._rule(module, where)
        path = rule.target.removesuffix(".weight")
        part = self._parts[path]
        rows, width = _shape(part, rule)
        for side, found, expected in (("A", own.a.shape, [own.rank, width]), ("B", own.b.shape, [rows, own.rank])):
            if list(found) != expected:
                raise CheckpointError(
                    f"{where}: tensor '{module}.lora_{side}.weight': expected shape {expected}, found {list(found)}; "
                    "it is an adapter of another base model"
                )
        if own.rank > self._rank:
            raise ConfigError(
                f"{where}: {module!r} has rank {own.rank}, and max_adapter_rank is {self._rank}; make the LLM with "
                f"max_adapter_rank={own.rank}"
            )
        dtype = np.dtype(part.a.dtype)
        a, b = own.a.astype(dtype), (own.b.astype(np.float32) * np.float32(own.scale)).astype(dtype)
        _check_finite(b, dtype, module, own, where)
        if isinstance(part, RowAdapters):
            return [((path, OUT), Placed(a, b))]
        made, first = [], 0
        sizes = {output.name: output.rows for output in part.outputs}
        for name in rule.parts:
            made.append(((path, name), Placed(a, b[first : first + sizes[name]])))
            first += sizes[name]
        return made

    def _rule(self, module: str, where: str) -> Rule:
        """Return the rule of a linear layer's weight.

        Raises:
            CheckpointError: the model has no such layer, or it cannot have adapters.
        """
        rules = self._table()
        known = naming.canonical(f"{module}.weight", set(rules))
        rule = rules.get(known)
        if rule is None:
            raise CheckpointError(
                f"{where}: this model has no linear layer {module!r}; it is an adapter of another base model, or of a "
                f"layer that jaxinfer computes otherwise. Layers that can have adapters: {self._supported()}"
            )
        path = (rule.target or "").removesuffix(".weight")
        if path not in self._parts:
            raise CheckpointError(
                f"{where}: {module!r} cannot have an adapter in jaxinfer (experts, routers, recurrent and latent "
                f"attention, embeddings, heads and encoders cannot); those that can: {self._supported()}. Leave it "
                f"out of target_modules, or {peft.MERGE}"
            )
        return rule

    def _supported(self) -> str:
        """Return the names of the layers that can have adapters, without their layers' numbers."""
        names = [
            name.removesuffix(".weight").split(".")[-1]
            for name, rule in self._table().items()
            if (rule.target or "").removesuffix(".weight") in self._parts
        ]
        return format_names(list(dict.fromkeys(names)))

    def _table(self) -> dict[str, Rule]:
        """Return the rules by all names that a checkpoint's tensors may have; raises as `registry.family_of`."""
        if self._rules is None:
            table = registry.family_of(self._module, "adapters").weight_rules(self._module.config)
            self._rules = {own: rule for rule in table for own in naming.known_names([rule])}
        return self._rules

    def install(self, prepared: Prepared, params: list[Any]) -> Adapter:
        """Put an adapter in its slot; runs on the engine thread."""
        adapter = prepared.adapter
        self._free(adapter.name)  # another thread may have added one meanwhile
        if any(other.slot == adapter.slot for other in self.by_name.values()):
            adapter.slot = self._free(adapter.name)
        self._replace(adapter.slot, prepared.held, params)
        self.by_name[adapter.name] = adapter
        return adapter

    def drop(self, name: str, params: list[Any]) -> None:
        """Empty an adapter's slot; runs on the engine thread."""
        adapter = self.by_name.pop(name)
        adapter.removed = True
        self._replace(adapter.slot, {}, params)

    def _replace(self, slot: int, held: Held, params: list[Any]) -> None:
        touched = {path for path, _ in (*self._slots[slot], *held)}
        self._slots[slot] = held
        for path in sorted(touched):
            self._fill(path, params)

    def restore(self, params: list[Any]) -> None:
        """Make arrays that were dropped with the model's weights again (`LLM.sleep(level=2)`)."""
        for path, places in self._places.items():
            if any(params[place] is None for place in places.values()):
                self._fill(path, params)

    def _fill(self, path: str, params: list[Any]) -> None:
        """Make the arrays of a projection from the matrices of all slots."""
        part = self._parts[path]
        outputs = {OUT: part} if isinstance(part, RowAdapters) else {one.name: one for one in part.outputs}
        width = _width(part)
        a = np.zeros((len(outputs), part.slots, part.rank, width), part.a.dtype)
        tensors = {"a": a.reshape(-1, width)}
        for number, name in enumerate(outputs):
            found = [(slot, held[path, name]) for slot, held in enumerate(self._slots) if (path, name) in held]
            weight = "b" if name == OUT and isinstance(part, RowAdapters) else f"b_{name}"
            b = np.zeros((_rows(part, name), part.slots, part.rank), part.a.dtype)
            for slot, own in found:
                a[number, slot, : len(own.a)] = own.a
                b[:, slot, : len(own.a)] = own.b
            tensors[weight] = b.reshape(len(b), -1)
        source = ArraySource(tensors)
        for name, place in self._places[path].items():
            weight = getattr(part, name)
            rule = Rule(name, None, tuple(output.name for output in weight.get_metadata().get("outputs", ())))
            params[place] = load_param(f"{path}.adapters.{name}", weight, [rule], source, self._mesh)


def _shape(part: FusedAdapters | RowAdapters, rule: Rule) -> tuple[int, int]:
    """Return rows and columns of the checkpoint's tensor that a rule is for."""
    return sum(_rows(part, name) for name in rule.parts or (OUT,)), _width(part)


def _rows(part: FusedAdapters | RowAdapters, name: str) -> int:
    if isinstance(part, RowAdapters):
        return part.b.shape[0]
    return next(output.rows for output in part.outputs if output.name == name)


def _width(part: FusedAdapters | RowAdapters) -> int:
    return part.a.shape[1] if isinstance(part, FusedAdapters) else part.a.get_metadata()["unpadded"][1]


def _check_finite(b: np.ndarray, dtype: np.dtype, module: str, own: Matrices, where: str) -> None:
    if not np.isfinite(b.astype(np.float32)).all():
        raise CheckpointError(
            f"{where}: '{module}.lora_B.weight' times its scale {own.scale:g} overflows {dtype.name}; use a dtype with "
            "a larger range"
        )
