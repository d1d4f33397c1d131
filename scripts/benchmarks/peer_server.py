"""Implement the peers' side of the protocol, JSON lines in and out; needs only Python."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol


class System(Protocol):
    """System under measurement."""

    def run(
        self, prompts: list[list[int]], lengths: list[int], concurrency: int | None, samples: int, temperature: float
    ) -> dict[str, Any]:
        """Run one pass; return its seconds, the arrival times of requests, and the tokens of each sample with their
        times.
        """
        ...


def serve(load: Callable[..., tuple[System, dict[str, str]]]) -> None:
    """Load a system with the command line's arguments, report its versions, and run work until stdin ends.

    Output of libraries goes to stderr; only replies go to stdout.
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
