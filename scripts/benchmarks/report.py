"""Format results as a JSON object or a table."""

from dataclasses import dataclass, field
from typing import Any

Figures = dict[str, float]


@dataclass
class Report:
    """Results of a benchmark."""

    work: dict[str, Any]
    jaxinfer: Figures = field(default_factory=dict)
    peers: dict[str, Figures] = field(default_factory=dict)
    ratio: Figures = field(default_factory=dict)
    """Speed of jaxinfer relative to the peer; above 1 is faster."""

    def add(self, figures: dict[str, Figures], ours: str, *, fast: str, label: str = "", invert: bool = False) -> None:
        """Add each system's figures, and the ratios of the figure named `fast`.

        Args:
            figures: figures by system name.
            ours: name of jaxinfer in `figures`.
            fast: figure to compute ratios of.
            label: suffix of each name, to distinguish workloads.
            invert: whether smaller is faster.
        """
        for name, own in figures.items():
            target = self.jaxinfer if name == ours else self.peers.setdefault(name, {})
            target.update({f"{metric}{label}": value for metric, value in own.items()})
            if name != ours:
                pair = figures[ours][fast], own[fast]
                self.ratio[f"{name}{label}"] = pair[1] / pair[0] if invert else pair[0] / pair[1]

    def as_dict(self) -> dict[str, Any]:
        """Return `{"work", "jaxinfer", "peers", "ratio"}`."""
        return {"work": self.work, "jaxinfer": self.jaxinfer, "peers": self.peers, "ratio": self.ratio}

    def as_table(self) -> str:
        """Format a table with a line per figure and a column per system."""
        columns = {"jaxinfer": self.jaxinfer, **self.peers}
        names = list(dict.fromkeys(name for own in columns.values() for name in own))
        width = max(map(len, names), default=0)
        lines = [f"{key}: {value}" for key, value in self.work.items()]
        lines.append(" " * width + "".join(f"{name:>14}" for name in columns))
        for name in names:
            cells = (f"{own[name]:14.4g}" if name in own else f"{'-':>14}" for own in columns.values())
            lines.append(f"{name:<{width}}" + "".join(cells))
        lines += [f"jaxinfer is {value:.2f} times as fast as {name}" for name, value in self.ratio.items()]
        return "\n".join(lines)
