"""LoRA adapter of an engine, as requests refer to it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(eq=False)
class Adapter:
    """Adapter that an `LLM` holds (`LLM.add_adapter`)."""

    name: str
    slot: int
    """Its place among the adapters of each projection, from 0 to `max_adapters` - 1."""
    rank: int
    """Largest rank of its matrices."""
    modules: int
    """Number of the model's linear layers that it changes."""
    digest: bytes
    """Hash of its matrices and scales: prompts share cached prefixes if it is equal."""
    removed: bool = False
    """Whether it was removed, so that its slot may hold another."""


def find(adapters: Mapping[str, Adapter] | None, name: str, where: str) -> Adapter:
    """Return the adapter of this name.

    Args:
        adapters: adapters by name; None if the engine takes none.
        name: the name asked for.
        where: the prompt, for errors.

    Raises:
        ValueError: there is none; names those that are there.
    """
    if adapters is None:
        raise ValueError(
            f"{where}: adapter is {name!r}, but this LLM takes none; make it with adapters={{name: folder}}"
        )
    found = adapters.get(name)
    if found is None:
        there = ", ".join(map(repr, adapters)) or "none"
        raise ValueError(f"{where}: adapter {name!r} is unknown; there are: {there}; add it with add_adapter")
    return found
