"""Build the HTML with which notebooks display objects: one style sheet and the elements that use it.

Text and background are the notebook's, in light and in dark mode: only marks are coloured, and lines are translucent.
"""

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
.jx{--line:rgba(128,128,128,.28);--soft:rgba(128,128,128,.12);
 font:13px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;max-width:1080px;color:inherit;text-align:left}
.jx *{box-sizing:border-box}
.jx code,.jx pre{font:12px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:none;color:inherit;
 padding:0}
.jx h4{font-size:16px;margin:0;font-weight:600}.jx p{margin:3px 0}.jx .dim{opacity:.68}
.jx .tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:8px;margin:12px 0}
.jx .tile{border:1px solid var(--line);border-radius:8px;padding:8px 12px}
.jx .tile b{display:block;font-size:17px;font-weight:600;font-variant-numeric:tabular-nums}
.jx .bar{display:flex;height:10px;border-radius:5px;background:var(--soft);overflow:hidden;width:100%}
.jx .bar i{height:100%;flex:none;min-width:1px}
.jx .wide{height:20px;border-radius:6px;margin:5px 0 6px}
.jx .key>span{margin-right:18px;white-space:nowrap}
.jx .key i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}
.jx .num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.jx table{border-collapse:collapse;margin:8px 0;color:inherit;background:none}
.jx table th,.jx table td{padding:3px 12px 3px 0;border:0;border-bottom:1px solid var(--line);text-align:left;
 background:none;color:inherit;vertical-align:top}
.jx table .num{text-align:right}
.jx table th{font-size:11px;letter-spacing:.04em;text-transform:uppercase;opacity:.68;font-weight:500}
.jx .text{white-space:pre-wrap;overflow-wrap:anywhere}
"""


def element(*parts: str, style: str = "", name: str = "") -> str:
    """Join parts in one element with its style sheet; `name`: a further CSS class, which `style` can refer to."""
    return f'<div class="{f"jx {name}".rstrip()}"><style>{STYLE}{style}</style>{"".join(parts)}</div>'


def title(text: str, below: str = "") -> str:
    """Return a title and a line below it."""
    return f"<h4>{escape(text)}</h4>" + (f'<p class="dim">{escape(below)}</p>' if below else "")


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """Return a row of tiles, one for each pair of a value and its description."""
    made = "".join(
        f'<div class="tile"><b>{escape(big)}</b><span class="dim">{escape(small)}</span></div>' for big, small in values
    )
    return f'<div class="tiles">{made}</div>'


def bar(parts: Iterable[tuple[str, float, str]], whole: float) -> str:
    """Return a bar of coloured parts with its key.

    Args:
        parts: colour (CSS), size and description of each part.
        whole: size of the whole bar.
    """
    parts = list(parts)
    strips = "".join(
        f'<i style="width:{100 * size / max(whole, 1e-9):.4f}%;background:{colour}"></i>'
        for colour, size, _ in parts
        if size
    )
    return f'<div class="bar wide">{strips}</div>{key((colour, what) for colour, _, what in parts)}'


def key(entries: Iterable[tuple[str, str]]) -> str:
    """Return a key: colours (CSS) and what they stand for."""
    made = "".join(
        f'<span><i style="background:{colour}"></i><span class="dim">{escape(what)}</span></span>'
        for colour, what in entries
    )
    return f'<p class="key">{made}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str | int | float]]) -> str:
    """Return a table; numbers are aligned to the right."""

    def cell(value: str | int | float) -> str:
        if isinstance(value, str):
            return f'<td class="text">{escape(value)}</td>'
        return f'<td class="num">{value:,}</td>' if isinstance(value, int) else f'<td class="num">{value:.3g}</td>'

    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
