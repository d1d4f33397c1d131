"""Read and change the outputs of a model's modules, by path, while a step is traced.

A step that neither captures nor changes outputs has no taps and is compiled without any change. A path is that of the
module in jaxinfer's model: "layers.11" (the output of a layer, after both residuals), "layers.11.attention",
"layers.11.mlp", "embedding", "norm". Hugging Face names that differ only by the prefix "model." are accepted.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.errors import ConfigError
from jaxinfer.layers.router import Router

LAST = "last_hidden_state"
"""Name of the model's own output: hidden states after the final norm, as transformers calls them."""
EXPERTS = "routed_experts"
"""Name of the experts that all routers chose, `[T, L, k]` for L layers with experts."""

Captured = dict[str, jax.Array]
"""Outputs of modules by path, each with a leading axis T of tokens."""


class Taps:
    """Outputs to read and to change in one step.

    Args:
        capture: paths of the modules to read, `LAST` and `EXPERTS` included.
        add: arrays `[T, M]` by path, added to the module's output before it is read.
    """

    def __init__(self, capture: Sequence[str] = (), add: Mapping[str, jax.Array] | None = None):
        self._capture, self._add = tuple(capture), dict(add or {})
        self._routers: list[str] = []
        self._found: Captured = {}

    def attach(self, module: nnx.Module) -> None:
        """Attach to the modules of a model that was merged for this trace alone.

        Raises:
            ConfigError: the model has no such module, or no experts.
        """
        paths = {*self._capture, *self._add} - {LAST, EXPERTS}
        if EXPERTS in self._capture:
            self._routers = routers(module)
            if not self._routers:
                raise ConfigError(f"{EXPERTS}: this model has no experts")
        for path in sorted(paths | {*self._routers}):
            part = module_at(module, path)
            object.__setattr__(part, "__class__", _tapped(type(part)))
            object.__setattr__(part, "_tap", lambda output, path=path: self._take(path, output))

    def _take(self, path: str, output: Any) -> Any:
        """Change and record the output of a call; a tuple's first array is its hidden states."""
        several = type(output) is tuple
        value = output[0] if several else output
        if not isinstance(value, jax.Array) or value.ndim < 2:
            raise ConfigError(f"{path} has no output array [tokens, ...]; name the module that contains it")
        if path in self._add:
            value = (value + self._add[path]).astype(value.dtype)
        self._found[path] = value
        return (value, *output[1:]) if several else value

    def captured(self, hidden: jax.Array) -> Captured:
        """Return what was read in a step whose output was `hidden` `[T, M]`.

        Raises:
            ConfigError: a module was never called.
        """
        for path in (*self._capture, *self._add):
            if path not in (LAST, EXPERTS) and path not in self._found:
                raise ConfigError(f"{path} is not called when text is computed; name the module that contains it")
        found = {LAST: hidden} | self._found
        if EXPERTS in self._capture:
            found[EXPERTS] = jnp.stack([self._found[path] for path in self._routers], axis=1)
        return {path: found[path] for path in self._capture}


@cache
def _tapped(kind: type) -> type:
    """Return a subclass whose calls pass their output through the module's `_tap`."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._tap(kind.__call__(self, *args, **kwargs))

    return type(kind.__name__, (kind,), {"__call__": call})


def normalise(path: str) -> str:
    """Return a path without the prefix "model." of Hugging Face names."""
    return path.removeprefix("model.")


def module_at(module: nnx.Module, path: str) -> Any:
    """Return the module at a path.

    Raises:
        ConfigError: there is none; names those that are there.
    """
    part, done = module, []
    for name in path.split("."):
        children = _children(part)
        if name not in children:
            where = f"{'.'.join(done)} has" if done else "the model has"
            raise ConfigError(f"{path!r} is no module of this model: {where} {_listed(children)}")
        part = children[name]
        done.append(name)
    return part


def _children(part: Any) -> dict[str, Any]:
    """Return the modules within a module, by name or index."""
    if isinstance(part, nnx.List | list | tuple):
        return {str(index): one for index, one in enumerate(part)}
    return {name: value for name, value in vars(part).items() if isinstance(value, nnx.Module)}


def _listed(children: Iterable[str]) -> str:
    names = list(children)
    if names and names[0].isdecimal():
        return f"0 to {names[-1]}"
    return ", ".join(names) or "no modules"


def routers(module: nnx.Module) -> list[str]:
    """Return the paths of the model's routers in the order of its layers."""

    def layer(path: Sequence[Any]) -> list[float]:
        return [int(name) if str(name).isdecimal() else math.inf for name in path]

    found = [path for path, part in nnx.iter_modules(module) if isinstance(part, Router)]
    return [".".join(map(str, path)) for path in sorted(found, key=layer)]
