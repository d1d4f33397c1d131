"""Classify the operations of a compiled program from its HLO text."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = ")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
FRAME = re.compile(r"stack_frame_id=(\d+)")
ROW = re.compile(r"^(\d+) (.*)$")
CATEGORIES = (
    ("sampling", re.compile(r"jaxinfer/engine/sampling/(?:sampler|drawing)\.py")),
    ("attention", re.compile(r"jaxinfer/layers/attention\.py attend|jaxinfer/kernels/\w*(attention|paged)")),
    ("gemms", re.compile(r"jaxinfer/layers/(linear\.py|embedding\.py Embedding\.logits)|jaxinfer/kernels/\w*matmul")),
)
"""Categories with their patterns, matched against "file function" of an operation's stack; the first match is used,
else "rest"."""


@dataclass(frozen=True)
class Operations:
    """Categories of a program's operations by name."""

    categories: dict[str, str]

    @property
    def names(self) -> set[str]:
        """Names of all operations."""
        return set(self.categories)

    def category(self, name: str) -> str:
        """Return an operation's category: "sampling", "attention", "gemms" or "rest"."""
        return self.categories.get(name, "rest")

    @classmethod
    def of(cls, text: str) -> "Operations":
        """Parse the output of `HloModule.to_string()`, whose header lists files, functions and stack frames."""
        lines = text.splitlines()
        stacks = _stacks(lines)
        own: dict[str, str | None] = {}
        calls: dict[str, str] = {}
        bodies: dict[str, Counter[str]] = {}
        body = Counter[str]()
        for line in lines:
            if start := COMPUTATION.match(line):
                body = bodies.setdefault(start["name"], Counter())
            elif made := INSTRUCTION.match(line):
                frame = FRAME.search(line)
                category = None if frame is None else _category(stacks.get(int(frame[1]), ""))
                own[made["name"]] = category
                if category is not None:
                    body[category] += 1
                if called := CALLED.search(line):
                    calls[made["name"]] = called[1]
        return cls({name: category or _most(bodies, calls.get(name)) for name, category in own.items()})


def _most(bodies: dict[str, Counter[str]], called: str | None) -> str:
    """Return the most frequent category within a fusion, for fusions without a stack frame of their own."""
    inside = bodies.get(called or "")
    return inside.most_common(1)[0][0] if inside else "rest"


def _category(stack: str) -> str:
    return next((name for name, pattern in CATEGORIES if pattern.search(stack)), "rest")


def _stacks(lines: list[str]) -> dict[int, str]:
    """Return, for each stack frame, "file function" of it and of all its callers."""
    files = dict(_rows(lines, "FileNames"))
    functions = dict(_rows(lines, "FunctionNames"))
    places, stacks = {}, {}
    for number, row in _rows(lines, "FileLocations"):
        fields = _fields(row)
        file, function = files[fields["file_name_id"]], functions[fields["function_name_id"]]
        places[number] = f"{file.strip(chr(34))} {function.strip(chr(34))}"
    for number, row in _rows(lines, "StackFrames"):
        fields = _fields(row)
        # parent_frame_id is offset by one: 1 means no caller, 2 means frame 1.
        caller = stacks.get(fields["parent_frame_id"] - 1, "")
        stacks[number] = f"{caller}\n{places[fields['file_location_id']]}"
    return stacks


def _rows(lines: list[str], title: str) -> Iterator[tuple[int, str]]:
    """Yield the numbered rows of a table in the header."""
    if title not in lines:
        return
    for line in lines[lines.index(title) + 1 :]:
        row = ROW.match(line)
        if row is None:
            return
        yield int(row[1]), row[2]


def _fields(row: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", row)}
