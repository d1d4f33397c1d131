"""Print measurements of placements as a table and sentences on a terminal."""

from collections.abc import Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from jaxinfer._utils.units import size_text
from jaxinfer.commands.plan.table import console
from jaxinfer.sharding.placement_rows import REPLICATION_NOTE
from placements.tuned import Tuned


def show(found: Tuned) -> None:
    """Print the measurements by module kind, and the resulting placement."""
    out = console()
    out.print(_timings(found))
    for line in conclusions(found):
        out.print(Text(line))
    if found.flags:
        print(found.flags)  # printed without wrapping, so that it can be pasted


def _timings(found: Tuned) -> Table:
    title = "milliseconds a step that replicating all of a kind saves"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", show_footer=True)
    table.add_column("kind", footer="the step, all sharded")
    table.add_column("modules", justify="right")
    table.add_column("a device, sharded", justify="right")
    table.add_column("replicated", justify="right")
    for timing in found.timings:
        table.add_column(str(timing.step), justify="right", footer=f"{1e3 * timing.seconds:.4g} ms")
    for kind in found.kinds:
        saved = (timing.saved.get(kind.pattern) for timing in found.timings)
        table.add_row(
            kind.pattern,
            str(kind.count),
            size_text(kind.sharded_bytes),
            size_text(kind.replicated_bytes),
            *("" if value is None else f"{1e3 * value:+.4g}" if value else "0" for value in saved),
        )
    return table


def conclusions(found: Tuned) -> Iterator[str]:
    """Yield the conclusions of the measurements, one line each."""
    yield "Times are of all layers, extrapolated from a few with random weights; 0 means that the passes disagree."
    if found.devices == 1:
        yield "There is one device: nothing is divided, so sharded and replicated are the same."
        return
    size = f"{size_text(found.plan.device_bytes)} of weights on each device"
    if not found.fits:
        yield f"No placement fits: with all sharded {size}, and no room for a cache of {found.needed_tokens:,} tokens."
    elif not found.proposal:
        yield f"All sharded is the fastest that fits: {size}."
    else:
        yield f"The fastest that fits replicates {', '.join(found.proposal)}: {size}. {REPLICATION_NOTE}"
        for timing in found.timings:
            again = found.confirmed[str(timing.step)]
            yield (
                f"  {timing.step}: {timing.ratio(found.proposal):.3f} of the time by the figures above; measured "
                f"together, in the model of few layers, {again:.3f}."
            )
