"""Replicas of a model in one process: an engine each, on devices of its own, and the choice of one for each request."""

from collections.abc import Sequence
from typing import TypeVar

from jax.sharding import Mesh

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.engine_thread import CLOSED, EngineThread
from jaxinfer.errors import EngineClosedError, EngineDeadError
from jaxinfer.loading.adapters import AdapterTable
from jaxinfer.loading.update import WeightTable
from jaxinfer.results.output_processor import Handle

Named = TypeVar("Named", bound=BaseException)


class Replica:
    """An engine's thread, with the tables that convert weights and adapters for it."""

    def __init__(self, engine: Engine, weights: WeightTable, adapters: AdapterTable):
        self.thread, self.weights, self.adapters = EngineThread(engine), weights, adapters

    @property
    def engine(self) -> Engine:
        """The engine. Its thread owns it; code on other threads must only read from it."""
        engine = getattr(self.thread, "engine", None)
        if engine is None:
            raise EngineClosedError(CLOSED)
        return engine

    @property
    def load(self) -> int:
        """Number of samples that are unfinished."""
        return sum(len(request.sequences) for request in list(self.engine.requests.values()))


def name_of(index: int, meshes: Sequence[Mesh]) -> str:
    """Return the name of a replica in errors; empty if there is only one."""
    ids = ", ".join(str(device.id) for device in meshes[index].devices.flat)
    return f"replica {index} (devices {ids})" if len(meshes) > 1 else ""


def named(error: Named, name: str) -> Named:
    """Return an error that names the replica it comes from."""
    return type(error)(f"{name}: {error}") if name else error


def divide(replicas: Sequence[Replica], handles: Sequence[Handle]) -> dict[Replica, list[Handle]]:
    """Return the requests that each replica gets: each goes to the one with the fewest unfinished samples.

    Replicas whose engine is dead get none. A request whose id is in use goes where it is in use, and is refused there.

    Raises:
        EngineDeadError: all engines are dead.
    """
    if len(replicas) == 1:
        return {replicas[0]: list(handles)} if handles else {}
    loads = {replica: replica.load for replica in replicas if replica.engine.dead is None}
    if not loads:
        raise EngineDeadError("; ".join(str(replica.engine.dead) for replica in replicas))
    shares: dict[Replica, list[Handle]] = {}
    for handle in handles:
        using = [replica for replica in loads if handle.request.id in replica.engine.requests]
        chosen = using[0] if using else min(loads, key=loads.__getitem__)
        loads[chosen] += len(handle.request.sequences)
        shares.setdefault(chosen, []).append(handle)
    return shares
