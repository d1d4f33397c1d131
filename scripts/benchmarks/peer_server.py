"""The peers' side of the protocol: lines of JSON in and out. Needs nothing but Python."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol


class System(Protocol):
    """Something that does the work."""

    def run(
        self, prompts: list[list[int]], lengths: list[int], concurrency: int | None, samples: int, temperature: float
    ) -> dict[str, Any]:
        """One pass: seconds, arrivals of the requests, and of each sample its tokens and their times."""
        ...


def serve(load: Callable[..., tuple[System, dict[str, str]]]) -> None:
    """Loads a system with the command line's arguments, says its versions, and runs work until stdin ends.

    What libraries print goes to stderr; stdout carries the answers alone.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        out.write(json.dumps(reply) + "\n")
        out.flush()

    system, versions = load(*sys.argv[1:])
    say({"ready": versions})
    for line in sys.stdin:
        try:
            say(system.run(**json.loads(line)))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})
