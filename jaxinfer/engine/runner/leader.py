"""What a runner asks of the object that replays its dispatches in other processes."""

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np

from jaxinfer.engine.runner.keys import Key
from jaxinfer.engine.runner.step_sampling import Sampled


class Leader(Protocol):
    """Replays each dispatch in other processes (`multihost.replay.Leader`)."""

    def launch(self, key: Key, arrays: Sequence[np.ndarray]) -> None:
        """Send a program that is about to be dispatched with these arrays."""
        ...

    def watch(self, result: Sampled | None) -> None:
        """Compare the result of the dispatch with the other processes, once it is computed."""
        ...

    def warm(self, sampling: Collection[str], threads: int | None) -> None:
        """Have the other processes compile the programs that this one is about to compile; `warmed` waits for them."""
        ...

    def warmed(self) -> None:
        """Wait until all processes have compiled."""
        ...

    def end(self) -> None:
        """End the other processes once they have replayed all steps; raise DistributedError if one has failed."""
        ...

    def cache(self, state: bytes) -> None:
        """Have the other processes free or allocate memory."""

    def give_up(self, error: BaseException) -> None:
        """End all processes after a failed step; raise with its error as the cause, unless it was an interrupt."""
        ...
