"""Read traces of requests: when each arrives, its prompt, and how many tokens it generates."""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

HASHED = 512
"""Prompt tokens that one of `hash_ids` stands for (Mooncake's traces, arXiv:2407.00079)."""
NAMES = {
    "at": ("timestamp", "arrival", "TIMESTAMP"),
    "prompt": ("input_length", "prompt_tokens", "ContextTokens"),
    "output": ("output_length", "output_tokens", "GeneratedTokens"),
}
"""Fields of a request: Mooncake's names, this project's, and those of the Azure LLM inference traces."""


EXAMPLE = '{"arrival": 0.5, "prompt_tokens": 300, "output_tokens": 120}'
DATE = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:?\d\d)?")


@dataclass(frozen=True)
class Arrival:
    """A request of a trace."""

    at: float
    """Seconds since the first request."""
    prompt: int
    """Number of prompt tokens."""
    output: int
    """Number of new tokens, at least 1."""
    hash_ids: tuple[int, ...] = ()
    """Contents of the prompt's spans of `HASHED` tokens: equal ids stand for equal tokens with equal tokens before."""

    def tokens(self, index: int, vocab: int) -> np.ndarray:
        """Return token ids `[prompt]` int32 that share prefixes as the trace says; other prompts share nothing.

        Args:
            index: number of the request, which makes its own tokens.
            vocab: number of token ids.
        """
        spans = [_random((1, one), HASHED, vocab) for one in self.hash_ids[: -(-self.prompt // HASHED)]]
        known = sum(map(len, spans))
        if known < self.prompt:
            spans.append(_random((2, index), self.prompt - known, vocab))
        return np.concatenate(spans)[: self.prompt]


def _random(seed: tuple[int, int], count: int, vocab: int) -> np.ndarray:
    return np.random.default_rng([seed[0], seed[1] & (2**63 - 1)]).integers(min(3, vocab - 1), vocab, count, np.int32)


def read(path: Path, rate: float = 1.0, limit: int | None = None) -> list[Arrival]:
    """Read a trace, sorted by arrival, whose times are divided by `rate`.

    Raises:
        ValueError: a row is not a request; names the file, the row and the field.
        OSError: the file cannot be read.
    """
    if not rate > 0:
        raise ValueError(f"--rate must be positive, got {rate:g}")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    found = [_arrival(row, f"{path}, line {line}") for line, row in _rows(path)]
    if not found:
        raise ValueError(f"{path} has no requests; write one a line, such as {EXAMPLE}")
    found.sort(key=lambda one: one.at)
    first = found[0].at
    return [Arrival((one.at - first) / rate, one.prompt, one.output, one.hash_ids) for one in found[:limit]]


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            yield from enumerate(csv.DictReader(file), 2)
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}); expected such as {EXAMPLE}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected an object such as {EXAMPLE}")
            yield number, row


def _arrival(row: Mapping[str, Any], where: str) -> Arrival:
    values = {}
    for field, names in NAMES.items():
        name = next((name for name in names if row.get(name) is not None), None)
        if name is None:
            raise ValueError(f"{where}: none of {', '.join(names)} is there; expected such as {EXAMPLE}")
        values[field] = _time(row[name], name, where) if field == "at" else _count(row[name], name, where)
    ids = row.get("hash_ids") or ()
    if not isinstance(ids, list | tuple) or not all(type(one) is int for one in ids):
        raise ValueError(f"{where}: hash_ids must be a list of integers, got {ids!r:.80}")
    return Arrival(**values, hash_ids=tuple(ids))


def _count(value: Any, name: str, where: str) -> int:
    try:
        number = int(value)
        if number < 1 or number != float(value) or isinstance(value, bool):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: {name} must be an integer of at least 1, got {value!r:.80}") from None
    return number


def _time(value: Any, name: str, where: str) -> float:
    """Return seconds: `arrival` has seconds, Mooncake's `timestamp` milliseconds, Azure's `TIMESTAMP` dates."""
    try:
        if name == "TIMESTAMP":
            # Azure's dates have up to seven digits of a second, Python's six.
            whole, part, zone = DATE.fullmatch(str(value).strip()).groups(default="")
            return datetime.fromisoformat(whole + (zone or "+00:00")).timestamp() + float(f"0{part or '.0'}")
        seconds = float(value) * (1e-3 if name == "timestamp" else 1)
        if isinstance(value, bool) or not 0 <= seconds < float("inf"):
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{where}: {name} must be a time of at least 0, got {value!r:.80}") from None
    return seconds
