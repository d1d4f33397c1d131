"""Print plans as tables and sentences on a terminal."""

import sys
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxinfer._utils.units import size_text
from jaxinfer.sharding import Plan
from jaxinfer.sharding.collectives import DECODE, SAMPLE, TOKEN
from jaxinfer.sharding.placement_html import axes_text, counts, mesh_text, token_bytes
from jaxinfer.sharding.placement_rows import REPLICATION_NOTE, Row
from jaxinfer.sharding.placement_tree import Node, tree

COLOURS = {"sharded": "blue", "replicated": "yellow", "both": "magenta", "": ""}
WIDTH = 150
"""Line width of output that does not go to a terminal."""


def console() -> Console:
    """Return a console for stdout, wide enough for a table if stdout is a file."""
    made = Console(soft_wrap=False, highlight=False)
    return made if sys.stdout.isatty() else Console(width=WIDTH, highlight=False)


def show(plan: Plan) -> None:
    """Print the parameters, the totals by module, and a summary."""
    out, root = console(), tree(plan)
    out.print(Text(f"{plan.model}, {mesh_text(plan)}", style="bold"))
    out.print(_parameters(plan, root))
    out.print(_modules(plan, root))
    for line in sentences(plan):
        out.print(Text(line))


def _parameters(plan: Plan, root: Node) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="parameters", title_justify="left")
    table.add_column("path", overflow="fold")
    table.add_column("shape and axes", overflow="fold")
    for name in ("dtype", "spec", "a device"):
        table.add_column(name, no_wrap=True, justify="right" if name == "a device" else "left")
    table.add_column("copies", justify="right")
    for path, row in _rows(root, ""):
        style = COLOURS["replicated" if row.copies == plan.devices > 1 else "sharded"]
        spec = str(tuple(row.spec)).replace("'", "").replace("None", "-") if any(row.spec) else "whole"
        shape = Text(axes_text(row, plan))
        table.add_row(Text(path, style=style), shape, row.dtype, spec, size_text(row.device_bytes), str(row.copies))
    return table


def _rows(node: Node, path: str) -> Iterator[tuple[str, Row]]:
    """Yield each parameter, with equal layers merged: `layers.{0..79}.mlp.down.weight`."""
    for row in node.rows:
        yield f"{path}{row.path.rsplit('.', 1)[-1]}", row
    for child in node.children:
        first, last = (end.rsplit(".", 1)[-1] for end in (child.path, child.last))
        yield from _rows(child, f"{path}{first if child.count == 1 else f'{{{first}..{last}}}'}.")


def _modules(plan: Plan, root: Node) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="modules", title_justify="left", show_footer=True)
    table.add_column("module", footer="all")
    table.add_column("placed")
    table.add_column("count", justify="right")
    table.add_column("a device, all of them", justify="right", footer=size_text(plan.device_bytes))
    for step in plan.steps:
        table.add_column(f"each {step} step", footer=counts(plan, step))
    for node, depth, times in _nodes(root, 0, 1):
        found = [node.collectives(step).items() for step in plan.steps]
        causes = (", ".join(f"{count * times} {kind}" for kind, count in own) for own in found)
        several = node.count * times
        table.add_row(
            "  " * depth + node.label,
            Text(node.placed, style=COLOURS[node.placed]),
            str(several) if several > 1 else "",
            size_text(node.device_bytes * times) if node.device_bytes else "",
            *causes,
        )
    return table


def _nodes(node: Node, depth: int, times: int) -> Iterator[tuple[Node, int, int]]:
    for child in node.children:
        yield child, depth, times
        yield from _nodes(child, depth + 1, times * child.count)


def sentences(plan: Plan) -> Iterator[str]:
    """Yield the summary of a plan, one sentence a line."""
    yield (
        f"Each device holds {size_text(plan.device_bytes)} of weights, "
        f"{size_text(plan.device_bytes * plan.devices)} on all {plan.devices}; a single copy of them takes "
        f"{size_text(plan.checkpoint_bytes)}."
    )
    if plan.draft_bytes:
        yield (
            f"The draft model's weights take {size_text(plan.draft_bytes)} more on each device; its keys and values "
            "are counted with the cache."
        )
    if plan.devices > 1:
        yield f"{size_text(plan.copied_bytes)} of it is the same on every device. {REPLICATION_NOTE}"
    for step in plan.steps:
        what = f"{counts(plan, step)}, {size_text(token_bytes(plan, step))} a token on each device"
        yield f"Each {step} step exchanges {what if plan.collectives(step) else 'nothing'}."
    if any(e.collective.rows == SAMPLE and DECODE in e.steps for e in plan.exchanges):
        yield f"The sampler's collectives are those of greedy rows; their bytes are not counted per {TOKEN}."
    if plan.cache is not None:
        yield from _cache(plan)


def _cache(plan: Plan) -> Iterator[str]:
    cache = plan.cache
    token = size_text(cache.block_device_bytes / cache.block_size)
    block = f"{size_text(cache.block_device_bytes)} a block of {cache.block_size} tokens"
    yield f"The cache takes {block} on each device, {token} a token."
    if cache.encoded_block_device_bytes:
        position = size_text(cache.encoded_block_device_bytes / cache.block_size)
        yield f"Each encoder position takes {position} on each device as well."
    if cache.state_device_bytes:
        state = size_text(cache.state_device_bytes)
        yield f"Each sequence also has a recurrent state of {state} on each device, whatever its length."
    if cache.replicated_layers and plan.devices > 1:
        names = _ranges(cache.replicated_layers)
        yield f"The cache of layer(s) {names} is whole on every device."
    if plan.tokens is not None and plan.memory is not None:
        weights = plan.device_bytes + plan.draft_bytes
        steps = f" and {size_text(plan.step_bytes)} for steps" if plan.step_bytes else ""
        share = f"{plan.share:g} of {size_text(plan.memory)} beside the weights{steps}"
        if plan.memory < weights:
            yield f"The weights do not fit: {size_text(plan.memory)} is what a device has."
        elif cache.sequences is None:
            yield f"{plan.tokens:,} tokens fit in {share}; every device holds the same share of them."
        else:
            states = size_text(cache.state_slots * cache.state_device_bytes)
            yield (
                f"{plan.tokens:,} tokens fit in {share}, beside {states} for {cache.state_slots:,} states: two for "
                f"each of {cache.sequences:,} sequences that run at a time at most, the others for snapshots of "
                "cached prefixes; every device holds the same share."
            )


def _ranges(numbers: tuple[int, ...]) -> str:
    """Format numbers as ranges: `0-3, 7`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
