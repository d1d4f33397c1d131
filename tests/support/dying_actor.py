"""An actor of `examples/ray_batch.py` that is killed while it computes a block; actors import this module."""

import os
import signal
from pathlib import Path

import numpy as np
import ray_batch

DIED = "JAXINFER_TEST_DIED"
"""Environment variable with the path of the file that says that an actor has been killed."""


class DyingGenerate(ray_batch.Generate):
    """Actor of which the first one that starts a block after another block was written kills its own process."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if list(self._out.glob("block-*.jsonl")):
            try:
                Path(os.environ[DIED]).touch(exist_ok=False)  # by one process only
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)
