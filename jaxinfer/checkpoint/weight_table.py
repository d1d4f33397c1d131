"""Lines of a weight table: which parameter each tensor of a checkpoint fills."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rule:
    """Mapping of one checkpoint tensor to a parameter, or to some rows of a fused or stacked one."""

    source: str
    """Tensor name in the checkpoint; `{i}` stands for the layer index."""
    target: str | None
    """Path of the parameter to fill; None for a known tensor that the model does not need."""
    parts: tuple[str, ...] = ()
    """Outputs of a fused parameter whose rows the tensor stacks, in its order."""
    also: tuple[str, ...] = ()
    """Alternative names of the tensor; a checkpoint holds it under only one of its names."""
    index: int | None = None
    """Index of the tensor in a stacked parameter; None if the tensor itself is the whole stack."""
    instead: tuple["Rule", ...] = ()
    """Rules of the tensors that hold the same values in checkpoints without this one (`models.moe_rules`)."""
    tied: str = ""
    """Name of the tie in `Family.untie`, for a tensor that config.json ties to the target's own tensor
    (`checkpoint.ties`); empty for other tensors."""
    optional: bool = False
    """Whether a checkpoint may omit the tensor; its parameter is then zero."""

    def of_layer(self, i: int) -> "Rule":
        """Return the rule with `{i}` replaced by the layer index."""
        source, *also = (name.replace("{i}", str(i)) for name in (self.source, *self.also))
        target = None if self.target is None else self.target.replace("{i}", str(i))
        instead = tuple(rule.of_layer(i) for rule in self.instead)
        return replace(self, source=source, target=target, also=tuple(also), instead=instead)

    def found(self, names: Container[str]) -> str | None:
        """Return the tensor's name in a checkpoint, or None if the checkpoint has none of its names."""
        return next((name for name in (self.source, *self.also) if name in names), None)


def expand(table: Iterable[Rule], layers: int) -> list[Rule]:
    """Return the table with `{i}` expanded for every layer."""
    return [rule.of_layer(i) for rule in table for i in (range(layers) if "{i}" in rule.source else (0,))]


def renamed(table: Iterable[Rule], names: Mapping[str, str], *, keep: bool = False) -> list[Rule]:
    """Return the table with parts of tensor names replaced; a name has at most one of the parts `names`.

    Args:
        table: the rules.
        names: part of a name in `table` -> the same in checkpoints.
        keep: whether checkpoints may also have the names in `table`.
    """

    def rename(name: str) -> str:
        return next((name.replace(old, new) for old, new in names.items() if old in name), name)

    return [
        replace(
            rule,
            source=rename(rule.source),
            also=(*map(rename, rule.also), *([rule.source, *rule.also] if keep else [])),
            instead=tuple(renamed(rule.instead, names, keep=keep)),
        )
        for rule in table
    ]
