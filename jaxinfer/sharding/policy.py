"""Which modules of a model are divided over the mesh and which are whole on every device: patterns over module paths.

    Placement({"vision_tower.*.attention": "replicate", "*.mlp": "shard"})

A module that is "shard"ed has its parameters divided where their logical axes say so (`sharding.rules`). One that is
"replicate"d has all of them copied to every device and is computed on every device; none lies on the first alone.
One that is divided by "experts" has whole experts on each device, where a sharded one has a part of each; whatever else
lies within it is sharded.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Any

from jaxinfer.errors import ConfigError

SHARD, REPLICATE, EXPERTS = "shard", "replicate", "experts"
TACTICS = (SHARD, REPLICATE, EXPERTS)


@dataclass(frozen=True)
class Placement:
    """Patterns, in order, and the tactic of the modules each names; whatever none names is sharded.

    In a pattern `*` stands for any characters, dots included, `?` for one, `[...]` for one of several. A pattern that
    names a module is for all within it, unless another names a module further inside.
    """

    patterns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.patterns, Mapping):
            raise ConfigError(f"placement must map patterns of module paths to tactics, got {self.patterns!r}")
        for pattern, tactic in self.patterns.items():
            if not isinstance(pattern, str) or not pattern:
                raise ConfigError(f"placement: a pattern must be a string such as 'layers.*.mlp', got {pattern!r}")
            if tactic not in TACTICS:
                raise ConfigError(
                    f"placement: {pattern!r} is given {tactic!r}; a tactic is one of {', '.join(TACTICS)}"
                )

    @classmethod
    def of(cls, given: Any) -> "Placement":
        """From what a user passes: a mapping, None, or a placement."""
        return given if isinstance(given, cls) else cls({} if given is None else given)

    def tactic(self, path: str) -> str:
        """Of the module at a path: that of the pattern which names it, or the module nearest around it.

        Raises:
            ConfigError: two patterns name the same module and contradict each other.
        """
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            tactic = self._named(".".join(parts[:end]))
            if tactic is not None:
                return tactic
        return SHARD

    def _named(self, path: str) -> str | None:
        """What the patterns that name this very module say of it; None: none does."""
        found = {pattern: tactic for pattern, tactic in self.patterns.items() if _matches(pattern, path)}
        if len(set(found.values())) > 1:
            raise ConfigError(
                f"placement: {path!r} is named by {' and by '.join(f'{p!r} ({t})' for p, t in found.items())}; "
                "let one pattern name it, or patterns of one tactic"
            )
        return next(iter(found.values()), None)

    def check(self, modules: Iterable[str], inside: Iterable[str] = (), experts: Iterable[str] = ()) -> None:
        """Whether every pattern names something, and something that is placed as a whole, and none contradicts another.

        Args:
            modules: paths of what can be placed and of all around it.
            inside: paths of what lies within one such module and follows it.
            experts: paths of the modules that have experts.

        Raises:
            ConfigError: a pattern that names nothing, or only what lies inside a module that is placed as one; two that
                contradict each other, also about a module of which another pattern names all parts; one that divides
                by experts what has none.
        """
        modules, inside, experts = list(modules), list(inside), list(experts)
        for path in modules:
            self._named(path)
        for pattern in self.patterns:
            if any(_matches(pattern, path) for path in modules):
                if self.patterns[pattern] == EXPERTS and not any(_matches_around(pattern, path) for path in experts):
                    raise ConfigError(
                        f"placement: {pattern!r} is given {EXPERTS!r}, and names nothing that has experts; "
                        f"{f'there are {_some(experts)}' if experts else f'this model has none: leave it {SHARD!r}'}"
                    )
                continue
            within = [path for path in inside if _matches(pattern, path)]
            if within:
                raise ConfigError(
                    f"placement: {pattern!r} names {within[0]!r}, which lies inside a module that is placed as a "
                    "whole; "
                    f"name that one: {within[0].rsplit('.', 1)[0]!r}"
                )
            raise ConfigError(f"placement: {pattern!r} names no module; there are {_some(modules)}")


def _matches(pattern: str, path: str) -> bool:
    return re.match(translate(pattern), path) is not None


def _matches_around(pattern: str, path: str) -> bool:
    """Whether it names the module or one around it."""
    parts = path.split(".")
    return any(_matches(pattern, ".".join(parts[:end])) for end in range(1, len(parts) + 1))


def _some(paths: list[str]) -> str:
    """Paths with the numbers of layers left out, each once."""
    return ", ".join(list(dict.fromkeys(map(any_layer, paths)))[:24])


def any_layer(path: str) -> str:
    """The pattern of the modules that differ from this one in the numbers of their layers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)
