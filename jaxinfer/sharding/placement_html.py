"""HTML rendering of a placement plan: self-contained HTML and CSS for notebooks (light and dark) and files."""

from collections.abc import Iterator
from html import escape

from jaxinfer._utils import html
from jaxinfer._utils.units import size_text
from jaxinfer.sharding.collectives import DECODE, PREFILL, STEPS, TOKEN
from jaxinfer.sharding.placement_rows import REPLICATION_NOTE, Placed, Row
from jaxinfer.sharding.placement_tree import Node, tree

# Styles of the module tree, in addition to those of `_utils.html`.
STYLE = """
.jxp{--shard:#4a8cf7;--copy:#ee9a2f;--cache:#3fae7b;}
.jxp .s{background:var(--shard)}.jxp .c{background:var(--copy)}.jxp .k{background:var(--cache)}
.jxp .t{background:currentColor;opacity:.4}
.jxp .tree{border-top:1px solid var(--line);margin:14px 0 8px}
.jxp .row{display:grid;grid-template-columns:minmax(230px,1fr) 92px 140px 140px 150px;gap:12px;align-items:center;
 padding:4px 8px;border-bottom:1px solid var(--line)}
.jxp .row>:nth-child(1){overflow-wrap:anywhere}
.jxp .head{font-size:11px;letter-spacing:.04em;text-transform:uppercase;opacity:.68}
.jxp summary{cursor:pointer;list-style:none}.jxp summary::-webkit-details-marker{display:none}
.jxp summary:hover{background:var(--soft)}.jxp .n{display:flex;align-items:baseline;gap:6px}
.jxp summary .n::before{content:"\\25b8";opacity:.6;width:.9em;flex:none}
.jxp details[open]>summary .n::before{content:"\\25be"}
.jxp .leaf .n::before{content:"";width:.9em;flex:none}
.jxp .num small,.jxp .n small{opacity:.68;font-size:11px;white-space:nowrap}
.jxp .tag{justify-self:start;font-size:11px;line-height:1;padding:4px 9px 4px 8px;border-radius:9px;
 background:var(--soft);white-space:nowrap}
.jxp .tag::before{content:"";display:inline-block;width:8px;height:8px;border-radius:50%;margin-right:6px}
.jxp .tag.sharded::before{background:var(--shard)}.jxp .tag.replicated::before{background:var(--copy)}
.jxp .tag.both::before{background:linear-gradient(90deg,var(--shard) 50%,var(--copy) 50%)}
.jxp .param{grid-template-columns:minmax(230px,1fr) 244px 140px 150px;background:var(--soft)}
.jxp .note{border-left:3px solid var(--copy);padding:2px 10px;margin:10px 0 0}
"""


def render(plan: Placed) -> str:
    """Render the plan as one HTML element."""
    root = tree(plan)
    head = (
        '<div class="row head"><span>module</span><span>placed</span><span class="num">on each device</span>'
        '<span></span><span class="num">in each step</span></div>'
    )
    body = "".join(_node(child, plan, 0, 1, root.device_bytes) for child in root.children)
    return html.element(
        _title(plan),
        _tiles(plan),
        _device(plan),
        f'<div class="tree">{head}{body}</div><p class="note">{escape(REPLICATION_NOTE)}</p>',
        style=STYLE,
        name="jxp",
    )


def page(plan: Placed) -> str:
    """Render the plan as an HTML document."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(plan.model or 'Placement')}</title></head>"
        f'<body style="margin:24px">{render(plan)}</body></html>\n'
    )


def counts(plan: Placed, step: str) -> str:
    """Describe the collectives of a step."""
    return " + ".join(f"{count} {kind}" for kind, count in plan.collectives(step).items()) or "no collectives"


def token_bytes(plan: Placed, step: str) -> int:
    """Return the bytes that a step's collectives exchange per token, on each device."""
    return sum(e.row_bytes for e in plan.exchanges if step in e.steps and e.collective.rows == TOKEN)


def mesh_text(plan: Placed) -> str:
    """Describe the mesh."""
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    return f"{plan.devices} device{'s' if plan.devices > 1 else ''} (mesh: {axes})"


def _title(plan: Placed) -> str:
    placement = ", ".join(f"{pattern}={tactic}" for pattern, tactic in plan.patterns.items())
    placement = f"placement: <code>{escape(placement)}</code>" if placement else "every module sharded"
    return f'<h4>{escape(plan.model)}</h4><p class="dim">{escape(mesh_text(plan))}, {placement}</p>'


def _tiles(plan: Placed) -> str:
    sizes = {step: f"{size_text(token_bytes(plan, step))} per token on each device" for step in plan.steps}
    steps = [(counts(plan, step), f"in each {step} step: {size}") for step, size in sizes.items()]
    if steps[0] == (steps[1][0], steps[1][1].replace(STEPS[1], STEPS[0])):
        steps[:2] = [(steps[0][0], steps[0][1].replace(STEPS[0], " or ".join(STEPS)))]
    tiles = [
        (size_text(plan.device_bytes), "of weights on each device"),
        (size_text(plan.checkpoint_bytes), "in the checkpoint, in these dtypes"),
        *steps,
    ]
    if plan.draft_bytes:
        tiles.append((size_text(plan.draft_bytes), "of a draft model's weights on each device"))
    if plan.cache is not None:
        per = size_text(plan.cache.block_device_bytes / plan.cache.block_size)
        tiles.append((per, "of cache per token on each device"))
        if plan.cache.encoded_block_device_bytes:
            per = size_text(plan.cache.encoded_block_device_bytes / plan.cache.block_size)
            tiles.append((per, "of cache per encoder position on each device"))
        if plan.cache.state_device_bytes:
            tiles.append(
                (size_text(plan.cache.state_device_bytes), "of state per sequence on each device, whatever its length")
            )
    if plan.tokens is not None and plan.cache.sequences is not None:
        tiles.append((f"{plan.cache.sequences:,}", "sequences run at a time at most, as many as states fit"))
    if plan.tokens is not None:
        tiles.append((f"{plan.tokens:,}", f"tokens fit beside the weights in {size_text(plan.memory or 0)}"))
    return html.tiles(tiles)


def _device(plan: Placed) -> str:
    """Render the memory use of one device, relative to its memory if known."""
    parts = [
        ("s", plan.device_bytes - plan.copied_bytes, "weights, sharded"),
        ("c", plan.copied_bytes, "weights, replicated"),
    ]
    if plan.draft_bytes:
        parts.append(("t", plan.draft_bytes, "draft model"))
    if plan.memory is not None and plan.step_bytes:
        parts.append(("t", plan.step_bytes, "steps"))
    if plan.cache_bytes is not None:
        parts.append(("k", plan.cache_bytes, "cache"))
    whole = max(plan.memory or 0, sum(size for _, size, _ in parts), 1)
    bars = "".join(f'<i class="{kind}" style="width:{100 * size / whole:.4f}%"></i>' for kind, size, _ in parts if size)
    keys = "".join(
        f'<span><i class="{kind}"></i><span class="dim">{escape(what)}: {size_text(size)}</span></span>'
        for kind, size, what in parts
    )
    where = "the device" if plan.devices == 1 else f"each of the {plan.devices} devices, all with the same"
    return f'<p class="dim">On {where}</p><div class="bar wide">{bars}</div><p class="key">{keys}</p>'


def _node(node: Node, plan: Placed, depth: int, times: int, whole: int) -> str:
    """Render a module in `times` equal enclosing modules; `whole` is the number of bytes of a full bar."""
    several, of_all = node.count * times, node.device_bytes * times
    equal = f"<small>({node.count} equal)</small>" if node.count > 1 else ""
    each = f"<br><small>{several} x {size_text(of_all / several)}</small>" if several > 1 and of_all else ""
    placed = node.placed if plan.devices > 1 else ""
    tag = f'<span class="tag {placed}">{placed}</span>' if placed else "<span></span>"
    size = size_text(of_all) if of_all else ""
    what = escape(", ".join(exchange.collective.what for exchange in node.exchanges), quote=True)
    causes = "<br>".join(_causes(node, plan, times))
    cells = (
        f'<span class="n" style="padding-left:{depth * 1.15:.2f}em" title="{escape(node.name, quote=True)}">'
        f'<code>{escape(node.label)}</code>{equal}</span>{tag}<span class="num">{size}{each}</span>'
        f'{_bar(node, times, whole)}<span class="num" title="{what}">{causes}</span>'
    )
    inside = "".join(_param(row, plan, depth + 1) for row in node.rows)
    inside += "".join(_node(child, plan, depth + 1, several, whole) for child in node.children)
    if not inside:
        return f'<div class="row leaf">{cells}</div>'
    folds = node.count > 1 or any(child.count > 1 for child in node.children)
    opened = " open" if node.children and (depth == 0 or folds) else ""
    return f'<details{opened}><summary class="row">{cells}</summary>{inside}</details>'


def _causes(node: Node, plan: Placed, times: int) -> Iterator[str]:
    """Yield the collectives of each step, naming unusual steps; prefill is omitted if equal to decode."""
    for step in plan.steps:
        named = "" if step in STEPS else f" <small>{escape(step)}</small>"
        if step != PREFILL or node.collectives(DECODE) != node.collectives(PREFILL):
            for kind, count in node.collectives(step).items():
                yield f"{count * times} {escape(kind)}{named}"


def _bar(node: Node, times: int, whole: int) -> str:
    """Render the sharded and the replicated part of a module's weights, relative to all weights."""
    parts = (("s", node.device_bytes - node.copied_bytes), ("c", node.copied_bytes))
    bars = "".join(f'<i class="{kind}" style="width:{100 * n * times / whole:.4f}%"></i>' for kind, n in parts if n)
    return f'<span class="bar">{bars}</span>' if bars else "<span></span>"


def axes_text(row: Row, plan: Placed) -> str:
    """Format the sizes and names of a parameter's axes, and by what each is divided."""
    parts = []
    for index, (size, name) in enumerate(zip(row.shape, row.logical_axes, strict=True)):
        over = row.spec[index] if index < len(row.spec) else None
        names = over if isinstance(over, tuple) else () if over is None else (over,)
        by = 1
        for axis in names:
            by *= plan.mesh[axis]
        parts.append(f"{size} {name or ''}".rstrip() + (f" /{by}" if by > 1 else ""))
    return f"[{', '.join(parts)}]"


def _param(row: Row, plan: Placed, depth: int) -> str:
    name = escape(row.path.split(".")[-1])
    copies = f"{row.copies} copies" if row.copies > 1 else "1 copy"
    title = escape(f"{row.path}: {row.logical_axes} as {row.spec}", quote=True)
    return (
        f'<div class="row leaf param" title="{title}"><span class="n" style="padding-left:{depth * 1.15:.2f}em">'
        f"<code>{name}</code></span><code>{escape(axes_text(row, plan))}</code>"
        f'<span class="num">{size_text(row.device_bytes)} <small>{escape(row.dtype)}</small></span>'
        f'<span class="num">{copies}</span></div>'
    )
