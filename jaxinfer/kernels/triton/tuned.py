"""Tile sizes of kernels that were measured on a device, in place of those estimated from shapes.

`scripts/tune.py` measures them and writes a table for each device. Tables are looked for in the folder that the
environment variable `JAXINFER_TUNED_TILES` names, then in `tuned/` beside this module. A table is JSON:

    {"device": "NVIDIA H100 80GB HBM3", "tiles": {"attend": {"heads=32 kv_heads=8 ...": {"block_n": 64, "warps": 4,
     "stages": 3, "us": 41.2, "estimated_us": 44.0}}}}
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from jaxinfer.errors import ConfigError
from jaxinfer.kernels.triton.triton_launch import Options, Target

FOLDER = "JAXINFER_TUNED_TILES"
"""Environment variable with the folder of a user's tables."""
PACKAGED = Path(__file__).parent / "tuned"
TILE_SIZES = ("block_m", "block_n", "block_k")
LEAST = 16
"""Smallest tile size: what a matrix product in Triton takes at least."""
OPTIONS = ("warps", "stages")
FIGURES = ("us", "estimated_us")
"""Fields of an entry that are not read: microseconds of a call with these tiles, and with those estimated."""

Tiles = TypeVar("Tiles")
"""A frozen dataclass with `options` and some of `TILE_SIZES`."""


@dataclass
class Calls:
    """The calls of kernels in the steps that were traced, and the tiles that they get meanwhile."""

    estimated: dict[tuple[str, str], Any] = field(default_factory=dict)
    """Estimated tiles by kernel and shape."""
    forced: Mapping[str, int] | None = None
    """Fields of the tiles that all calls get; None for those of the table."""


_calls: ContextVar[Calls | None] = ContextVar("calls", default=None)


@contextmanager
def watching(forced: Mapping[str, int] | None = None) -> Iterator[Calls]:
    """Collect the calls that are traced in this context, and choose their tiles."""
    token = _calls.set(Calls(forced=forced))
    try:
        yield _calls.get()
    finally:
        _calls.reset(token)


def choose(kernel: str, shape: Mapping[str, int], estimated: Tiles, target: Target) -> Tiles:
    """Return the tiles of a call: those measured on the device, if there are any, or those estimated.

    Args:
        kernel: name of the kernel.
        shape: what the tiles depend on, by name.
        estimated: tiles estimated from the shape.
        target: the device.

    Raises:
        ConfigError: the device's table cannot be used.
    """
    key, calls = shape_text(shape), _calls.get()
    if calls is not None:
        calls.estimated[kernel, key] = estimated
        if calls.forced is not None:
            return changed(estimated, calls.forced)
    entry = table(target.kind).get(kernel, {}).get(key)
    return estimated if entry is None else changed(estimated, entry)


def changed(tiles: Tiles, entry: Mapping[str, int]) -> Tiles:
    """Return tiles with the sizes and options of a table's entry."""
    sizes = {name: entry[name] for name in _sizes(tiles) if name in entry}
    options = {name: entry[name] for name in OPTIONS if name in entry}
    return replace(tiles, **sizes, options=replace(tiles.options, **options))


def entry_of(tiles: Any) -> dict[str, int]:
    """Return the table entry of tiles; the inverse of `changed`."""
    options: Options = tiles.options
    return {name: getattr(tiles, name) for name in _sizes(tiles)} | vars(options)


def _sizes(tiles: Any) -> list[str]:
    """Return the names of the sizes that may be chosen: not the rows of a query tile, which hold its heads."""
    return [
        name for name in TILE_SIZES if hasattr(tiles, name) and not (name == "block_m" and hasattr(tiles, "members"))
    ]


def shape_text(shape: Mapping[str, int]) -> str:
    """Return the key of a shape in a table."""
    return " ".join(f"{name}={int(size)}" for name, size in shape.items())


def file_name(device: str) -> str:
    """Return the name of a device's table."""
    return re.sub(r"[^A-Za-z0-9]+", "_", device) + ".json"


@cache
def table(device: str) -> Mapping[str, Mapping[str, Mapping[str, int]]]:
    """Return the entries of a device by kernel and shape; empty if it has no table.

    Raises:
        ConfigError: a table cannot be read, or has an entry that is no tile size.
    """
    own = os.environ.get(FOLDER)
    for folder in ([Path(own)] if own else []) + [PACKAGED]:
        if device and (path := folder / file_name(device)).is_file():
            return read(path)
    return {}


def read(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Read and check a table.

    Raises:
        ConfigError: it is not one; names the file and the entry.
    """
    try:
        tiles = json.loads(path.read_text(encoding="utf-8"))["tiles"]
        entries = [(kernel, key, entry) for kernel, own in tiles.items() for key, entry in own.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no table of tiles ({type(error).__name__}: {error}); remove it") from error
    for kernel, key, entry in entries:
        if (wrong := _wrong(entry)) is not None:
            raise ConfigError(f"{path}: {kernel}, {key}: {wrong}; remove the entry, or tune again (scripts/tune.py)")
    return tiles


def _wrong(entry: Any) -> str | None:
    """Return what is wrong with an entry."""
    if not isinstance(entry, dict):
        return f"it must be an object, got {entry!r}"
    for name, value in entry.items():
        if name in FIGURES:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if name not in (*TILE_SIZES, *OPTIONS):
            return f"unknown field {name!r}"
        least = LEAST if name in TILE_SIZES else 1
        if not whole or not least <= value <= 1024 or (name != "stages" and value & (value - 1)):
            form = "an integer" if name == "stages" else "a power of two"
            return f"{name} must be {form} in [{least}, 1024], got {value!r}"
    return None
