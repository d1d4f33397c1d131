"""Placement policy: patterns over module paths that select which modules are sharded and which are replicated.

    Placement({"vision_tower.*.attention": "replicate", "*.mlp": "shard"})

With "shard" parameters are sharded according to their logical axes (`sharding.rules`). With "replicate" all parameters
are copied to every device and the module is computed on every device. With "experts" each device holds whole experts
(expert parallelism), where "shard" splits every expert; the rest of the module is sharded.
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
    """Ordered patterns and the tactic of the modules they match; modules without a match are sharded.

    In patterns `*` matches any characters including dots, `?` one character, `[...]` one of several. A pattern that
    matches a module applies to everything inside it, unless another pattern matches a module further inside.
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
                    f"placement: the tactic of {pattern!r} is {tactic!r}; supported: {', '.join(TACTICS)}"
                )

    @classmethod
    def of(cls, given: Any) -> "Placement":
        """Convert what a user passes: a mapping, None, or a placement."""
        return given if isinstance(given, cls) else cls({} if given is None else given)

    def tactic(self, path: str) -> str:
        """Return the tactic of a module: that of the pattern that matches it or its nearest enclosing module.

        Raises:
            ConfigError: contradicting patterns match the same module.
        """
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            tactic = self._named(".".join(parts[:end]))
            if tactic is not None:
                return tactic
        return SHARD

    def _named(self, path: str) -> str | None:
        """Return the tactic of the patterns that match exactly this module; None if none does."""
        found = {pattern: tactic for pattern, tactic in self.patterns.items() if _matches(pattern, path)}
        if len(set(found.values())) > 1:
            raise ConfigError(
                f"placement: {path!r} is matched by {' and by '.join(f'{p!r} ({t})' for p, t in found.items())}; "
                "let one pattern match it, or give all of them the same tactic"
            )
        return next(iter(found.values()), None)

    def check(self, modules: Iterable[str], inside: Iterable[str] = (), experts: Iterable[str] = ()) -> None:
        """Check that every pattern matches a module that can be placed, and that no two contradict each other.

        Args:
            modules: paths of modules that can be placed, and of the modules around them.
            inside: paths inside modules that are placed as a whole.
            experts: paths of modules with experts.

        Raises:
            ConfigError: a pattern matches nothing, or only paths in `inside`; two patterns contradict each other, also
                about a module all of whose parts another pattern matches; or "experts" is given to a module without
                experts.
        """
        modules, inside, experts = list(modules), list(inside), list(experts)
        for path in modules:
            self._named(path)
        for pattern in self.patterns:
            if any(_matches(pattern, path) for path in modules):
                if self.patterns[pattern] == EXPERTS and not any(_matches_around(pattern, path) for path in experts):
                    raise ConfigError(
                        f"placement: {pattern!r} is given {EXPERTS!r}, but matches no module with experts; "
                        + (
                            f"modules with experts: {_listed(experts)}"
                            if experts
                            else f"this model has none, use {SHARD!r}"
                        )
                    )
                continue
            within = [path for path in inside if _matches(pattern, path)]
            if within:
                raise ConfigError(
                    f"placement: {pattern!r} matches {within[0]!r}, which is part of a module placed as a whole; "
                    f"match {within[0].rsplit('.', 1)[0]!r} instead"
                )
            raise ConfigError(f"placement: {pattern!r} matches no module; modules: {_listed(modules)}")


def _matches(pattern: str, path: str) -> bool:
    return re.match(translate(pattern), path) is not None


def _matches_around(pattern: str, path: str) -> bool:
    """Return whether the pattern matches the module or one that encloses it."""
    parts = path.split(".")
    return any(_matches(pattern, ".".join(parts[:end])) for end in range(1, len(parts) + 1))


def _listed(paths: list[str]) -> str:
    """List paths with layer numbers replaced by `*`, without duplicates."""
    return ", ".join(list(dict.fromkeys(map(any_layer, paths)))[:24])


def any_layer(path: str) -> str:
    """Return the pattern that matches the same module in every layer."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)
