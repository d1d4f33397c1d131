"""A plan as a tree of modules, in which equal layers are one node: what a table or a picture of it shows."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from jaxinfer.sharding.placement_rows import Exchange, Placed, Row
from jaxinfer.sharding.policy import REPLICATE


@dataclass(frozen=True)
class Node:
    """A module, or neighbouring ones that are equal in all but their number."""

    path: str
    """Of the first of them."""
    last: str
    """Of the last; the same where there is one."""
    alike: int
    """How many they are."""
    rows: tuple[Row, ...]
    """Parameters of the first that lie in no part of it."""
    exchanges: tuple[Exchange, ...]
    """Collectives that the first causes itself."""
    children: tuple["Node", ...]
    """Its parts."""
    device_bytes: int
    """Of all of them, with their parts, on each device."""
    copied_bytes: int
    """Of them, those that every device has alike."""

    @property
    def name(self) -> str:
        """The path, or from which to which."""
        return self.path if self.alike == 1 else f"{self.path} ... {self.last}"

    @property
    def label(self) -> str:
        """What tells it from its neighbours: the last part of its path, of a layer the part before it as well."""
        ends = [path.split(".")[-2:] for path in dict.fromkeys((self.path, self.last))]
        return " ... ".join(".".join(end if end[-1].isdigit() else end[-1:]) for end in ends)

    @property
    def placed(self) -> str:
        """ "sharded", "replicated" (all of it is the same on every device), "both", or nothing where it has no weights.

        What is small and the same everywhere, as a norm's scale, does not make a sharded module "both".
        """
        if not self.device_bytes:
            return ""
        if self.copied_bytes == self.device_bytes:
            return "replicated"
        return "both" if REPLICATE in self._tactics() else "sharded"

    def _tactics(self) -> frozenset[str]:
        return frozenset(row.tactic for row in self.rows).union(*(child._tactics() for child in self.children))

    def collectives(self, step: str) -> Counter[str]:
        """How many of each kind all of them, with their parts, cause in a step."""
        found = Counter(exchange.collective.kind for exchange in self.exchanges if step in exchange.steps)
        for child in self.children:
            found += child.collectives(step)
        return Counter({kind: count * self.alike for kind, count in found.items()})


def tree(plan: Placed) -> Node:
    """The whole model; what has no weights, as the sampler, is a part of it."""
    copied = plan.devices if plan.devices > 1 else 0
    items = [(tuple(row.path.split(".")[:-1]), row) for row in plan.rows]
    items += [(tuple(exchange.module.split(".")), exchange) for exchange in plan.exchanges]
    return _node((), items, lambda row: row.copies == copied)


_Item = tuple[tuple[str, ...], Row | Exchange]


def _node(path: tuple[str, ...], items: Sequence[_Item], copied: Callable[[Row], bool]) -> Node:
    """`items`: with the paths of the modules they belong to, all of which start with `path`."""
    own = [item for at, item in items if at == path]
    parts: dict[str, list[_Item]] = {}
    for at, item in items:
        if at != path:
            parts.setdefault(at[len(path)], []).append((at, item))
    children = _fold([_node((*path, name), inside, copied) for name, inside in parts.items()])
    rows = tuple(item for item in own if isinstance(item, Row))
    return Node(
        ".".join(path),
        ".".join(path),
        1,
        rows,
        tuple(item for item in own if isinstance(item, Exchange)),
        children,
        sum(row.device_bytes for row in rows) + sum(child.device_bytes for child in children),
        sum(row.device_bytes for row in rows if copied(row)) + sum(child.copied_bytes for child in children),
    )


def _fold(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """Neighbours that are numbered and equal as one."""
    folded = []
    for _, group in groupby(nodes, lambda node: (node.path.split(".")[-1].isdigit() or node.path, _shape(node))):
        first, *others = group
        count = 1 + len(others)
        folded.append(
            Node(
                first.path,
                others[-1].path if others else first.path,
                count,
                first.rows,
                first.exchanges,
                first.children,
                first.device_bytes * count,
                first.copied_bytes * count,
            )
        )
    return tuple(folded)


def _shape(node: Node) -> tuple:
    """What two modules have in common that differ in their place alone."""
    start = len(node.path)
    rows = [
        (row.path[start:], row.tactic, row.shape, row.dtype, row.logical_axes, tuple(row.spec), row.copies)
        for row in node.rows
    ]
    exchanges = [(exchange.collective, exchange.steps, exchange.row_bytes) for exchange in node.exchanges]
    return tuple(rows), tuple(exchanges), tuple((c.path[start:], c.alike, _shape(c)) for c in node.children)
