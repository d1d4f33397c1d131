"""Constructors that refuse unknown keywords with an error that names the right ones."""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


def refuse_unknown(replaced: Mapping[str, str]) -> Callable[[C], C]:
    """Return a decorator of dataclasses whose TypeError names an unknown field and what to use in its place.

    Args:
        replaced: hints by the field's name in other libraries; for other names the closest field is suggested.
    """

    def decorate(cls: C) -> C:
        generated = cls.__init__

        @functools.wraps(generated)
        def __init__(self: Any, *args: Any, **fields: Any) -> None:
            known = [field.name for field in dataclasses.fields(cls)]
            if args:
                raise TypeError(
                    f"{cls.__name__} takes keywords only, e.g. {cls.__name__}({known[0]}=...), "
                    f"got {len(args)} positional argument(s)."
                )
            for name in fields:
                if name not in known:
                    hint = replaced.get(name) or _suggest(name, known)
                    raise TypeError(f"{cls.__name__} has no field {name!r}: {hint}")
            generated(self, **fields)

        cls.__init__ = __init__
        return cls

    return decorate


def _suggest(name: str, known: Sequence[str]) -> str:
    public = [field for field in known if not field.startswith("_")]
    close = difflib.get_close_matches(name, public, n=1)
    return f"did you mean {close[0]}?" if close else "the fields are " + ", ".join(public)
