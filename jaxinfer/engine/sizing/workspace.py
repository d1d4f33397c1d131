"""What a step needs beside its arguments, estimated before anything is compiled."""

import math
from collections.abc import Iterator
from typing import Any


def peak_bytes(jaxpr: Any) -> int:
    """The most bytes of intermediate values that a traced function has alive at a time.

    An estimate from above: what XLA fuses is never written. Arrays that are divided over devices count whole.

    Args:
        jaxpr: of `jax.make_jaxpr`, or one within it.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    last = {var: at for at, equation in enumerate(jaxpr.eqns) for var in equation.invars if _is_var(var)}
    last |= dict.fromkeys(filter(_is_var, jaxpr.outvars), len(jaxpr.eqns))
    alive: dict[Any, int] = {}
    peak = 0
    for at, equation in enumerate(jaxpr.eqns):
        alive |= {var: _bytes(var) for var in equation.outvars}
        peak = max(peak, sum(alive.values()) + max(map(peak_bytes, _within(equation)), default=0))
        alive = {var: size for var, size in alive.items() if last.get(var, -1) > at}
    return peak


def _is_var(value: Any) -> bool:
    return not hasattr(value, "val")  # a literal has one


def _bytes(var: Any) -> int:
    itemsize = getattr(getattr(var.aval, "dtype", None), "itemsize", 0)
    return math.prod(getattr(var.aval, "shape", ())) * itemsize


def _within(equation: Any) -> Iterator[Any]:
    """The functions that an equation calls."""
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "eqns") or hasattr(getattr(one, "jaxpr", None), "eqns"):
                yield one
