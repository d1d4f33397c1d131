"""Format results as a table of goals and figures; unmeasured cells stay empty."""

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.rows import ROWS, Row

NOT_YET = "not yet measured"


def state(result: Mapping[str, Any] | None) -> str:
    """Describe the state of a row in a few words."""
    if result is None:
        return NOT_YET
    reason = f": {result['reason']}" if result["reason"] else ""
    return f"{result['status']} in {result['seconds']:.0f} s{reason}"


def markdown(machine: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the machine, the table of goals, and the figures of each row as Markdown."""
    lines = [f"{key}: {value}" for key, value in machine.items() if key != "versions"]
    lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    if any(result["dry"] for result in results.values()):
        lines += ["", "**A dry run at toy sizes: these figures are meaningless.**"]
    lines += ["", "| row | what | goal | measured | |", "|---|---|---|---|---|"]
    for row in ROWS:
        lines += _goals(row, results.get(row.name))
    for row in ROWS:
        result = results.get(row.name)
        if result and result["figures"]:
            lines += ["", f"## {row.name}", "", f"{row.what} ({state(result)})", ""]
            lines += [f"- {name}: {_shown(value)}" for name, value in result["figures"].items()]
    return "\n".join(lines) + "\n"


def _goals(row: Row, result: Mapping[str, Any] | None) -> list[str]:
    figures = result["figures"] if result else {}
    lines = []
    for goal in row.goals:
        value = figures.get(goal.figure)
        if value is None:
            measured, verdict = NOT_YET, result["reason"] if result else ""
        else:
            measured = f"{goal.figure} = {_shown(value)}"
            verdict = "" if result["dry"] else "reached" if goal.met(value) else "not reached"
        lines.append(_line(row.name, row.what, goal.text, measured, verdict))
    return lines or [_line(row.name, row.what, "", state(result), "")]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_shown(own)}" for name, own in value.items())
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return str(value)
