"""Resolve tied parameters: config.json declares them, and the checkpoint's tensors confirm or contradict it.

A tied tensor is a `Rule` with `tied`. As in transformers, it fills its parameter if the checkpoint has no other tensor
for that parameter, is skipped if both are present and equal, and gets a parameter of its own if they differ.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from jaxinfer.checkpoint.copying import COPY_ELEMENTS
from jaxinfer.checkpoint.source import Source
from jaxinfer.checkpoint.weight_table import Rule

log = logging.getLogger(__name__)


def resolve(
    config: Any, table: Callable[[Any], Sequence[Rule]], untie: Callable[[Any, str], Any], source: Source
) -> Any:
    """Remove the ties that the checkpoint's tensors contradict from the model's configuration; log each of them.

    Args:
        config: model configuration made from config.json.
        table: `Family.weight_rules`.
        untie: `Family.untie`.
        source: checkpoint to read from.

    Returns:
        The configuration without these ties.
    """
    for rule, other in list(pairs(table(config), set(source.names()))):
        if not _equal(rule.source, other, source):
            log.warning(
                "config.json says that %s is tied to %s, but the checkpoint has both, and they differ: both are used. "
                "Set tie_word_embeddings to false to say so in config.json",
                rule.source,
                other,
            )
            config = untie(config, rule.tied)
    return config


def resolve_stored(
    config: Any, table: Callable[[Any], Sequence[Rule]], untie: Callable[[Any, str], Any], stored: Collection[str]
) -> Any:
    """Return the configuration with the ties of a converted folder, derived from its stored parameters."""
    for name in dict.fromkeys(rule.tied for rule in table(config) if rule.tied):
        untied = untie(config, name)
        more = {rule.target for rule in table(untied)} - {rule.target for rule in table(config)}
        if more and more <= {*stored, None}:
            config = untied
    return config


def pairs(table: Sequence[Rule], names: set[str]) -> Iterator[tuple[Rule, str]]:
    """Yield each tied tensor with the name of the tensor it should equal, if the checkpoint has both."""
    first: dict[str | None, str] = {}
    for rule in sorted(table, key=lambda rule: bool(rule.tied)):
        own = rule.found(names)
        if own is None or rule.parts:
            continue
        if rule.tied and rule.target in first:
            yield Rule(own, rule.target, tied=rule.tied), first[rule.target]
        first.setdefault(rule.target, own)


def _equal(name: str, other: str, source: Source) -> bool:
    """Return whether two tensors are equal; reads a few rows at a time and stops at the first difference."""
    shape = tuple(source.info(name).shape)
    if shape != tuple(source.info(other).shape):
        return False
    step = max(1, COPY_ELEMENTS * shape[0] // max(1, int(np.prod(shape))))
    for first in range(0, shape[0], step):
        rows = (slice(first, min(first + step, shape[0])),)
        same = _arrays_equal(source.read(name, rows), source.read(other, rows))
        source.release()
        if not same:
            return False
    return True


def _arrays_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Compare arrays. Arrays of one dtype are compared bytewise, eight bytes at a time: faster, and equal NaNs count
    as equal.
    """
    if a.dtype == b.dtype:
        a, b = (np.frombuffer(np.ascontiguousarray(part), np.uint8) for part in (a, b))
        if a.size % 8 == 0:
            a, b = a.view(np.uint64), b.view(np.uint64)
    return bool(np.array_equal(a, b))
