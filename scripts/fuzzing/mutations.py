"""Mutate JSON values and bytes, determined by the random generator alone."""

import copy
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    2**20,
    2**31,
    2**63,
    -(2**63),
    10**30,
    10**400,
    0.0,
    0.5,
    -1.5,
    8.0,
    1e-300,
    1e300,
    float("inf"),
    float("nan"),
    "",
    "x",
    "bfloat16",
    "full_attention",
    "4",
    "\ud800",
    "x" * 5000,
    [],
    [0],
    [None],
    [[]],
    ["x"],
    [1] * 5000,
    {},
    {"x": 1},
    {"": None},
    {"type": "yarn"},
    {"full_attention": 3},
)
"""Replacement values."""


def broken(rng: random.Random, tree: Any, most: int = 3) -> Any:
    """Return a copy of a JSON value with one to `most` mutations."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, most)):
        places = list(_places(tree))
        if not places:
            return copy.deepcopy(rng.choice(VALUES))
        holder, key = rng.choice(places)
        _break(rng, holder, key, places)
    return tree


def broken_bytes(rng: random.Random, data: bytes, most: int = 4) -> bytes:
    """Return the bytes with one to `most` places flipped, deleted, duplicated or replaced."""
    for _ in range(rng.randint(1, most)):
        at, length = rng.randrange(len(data) + 1), rng.randint(1, 16)
        piece = rng.choice((b"", data[at : at + length] * 2, rng.randbytes(length), b"\x00" * length, b"\xff"))
        data = data[:at] + piece + data[at + length :]
    return data


def _places(tree: Any) -> Any:
    """Return every place in a JSON value as its container and key or index."""
    if isinstance(tree, dict | list):
        for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree[:8])):
            yield tree, key
            yield from _places(value)


def _break(rng: random.Random, holder: Any, key: Any, places: list[Any]) -> None:
    value, how = holder[key], rng.randrange(8)
    if how == 0:
        del holder[key]
    elif how == 1 and type(value) in (int, float) and abs(value) < 2**100:
        holder[key] = rng.choice((-value, value + 1, value * 2, value * 1000003, float(value), str(value)))
    elif how == 2:
        other, name = rng.choice(places)
        try:
            holder[key] = copy.deepcopy(other[name])
        except (KeyError, IndexError):  # an earlier mutation removed it
            holder[key] = None
    elif how == 3:
        nested: Any = value
        for _ in range(rng.choice((1, 2, 100))):
            nested = [nested] if rng.random() < 0.5 else {"x": nested}
        holder[key] = nested
    elif how == 4 and isinstance(holder, dict):
        holder[rng.choice(("unknown", "is_causal", "use_rope", "quantization_config", str(key) + "_"))] = copy.deepcopy(
            rng.choice(VALUES)
        )
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
