"""Joining of processes: through `jax.distributed`, then by a connection of each process to process 0."""

import json
import logging
import os
import secrets
import socket
import sys
import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxinfer.distributed.group import Group
from jaxinfer.distributed.wire import Peer, admit, introduce
from jaxinfer.errors import ConfigError, DistributedError

log = logging.getLogger(__name__)

PEER_TIMEOUT = 30.0
"""Default timeout in seconds within which a dead or silent process ends all of them."""
JOIN_SECONDS = 60.0
"""Seconds that process 0 waits for connections, once all processes have started to create their `LLM`."""
INVITATION_BYTES = 4096
LOCAL = "127.0.0.1"


def initialize(coordinator: str, num_processes: int, process_id: int, *, join_timeout: int = 300) -> None:
    """Join several processes: `jax.distributed.initialize` with validated arguments.

    Call it in each process before any other use of JAX, or call `jax.distributed.initialize` directly. Until the `LLM`
    is created, which has its own failure detection, JAX ends all processes when one has been silent for 100 s.

    Args:
        coordinator: "HOST:PORT" of process 0, the same in all processes; the host must be reachable from the others,
            the port free.
        num_processes: number of processes.
        process_id: number of this process, from 0.
        join_timeout: seconds to wait for all processes.

    Raises:
        ConfigError: an invalid argument; names it.
        DistributedError: not all processes joined in time.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"coordinator must be HOST:PORT, such as 10.0.0.1:7654, got {coordinator!r}")
    for name, value in (("num_processes", num_processes), ("process_id", process_id)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name} must be an integer, got {value!r}")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise ConfigError(f"process_id must be in [0, num_processes), got {process_id} of {num_processes}")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate",
            initialization_timeout=join_timeout,
        )
    except RuntimeError as error:
        raise DistributedError(
            f"process {process_id} of {num_processes} could not join at {coordinator}: {error}"
        ) from error


def join(mesh: Mesh | None, peer_timeout: Any = None) -> Group | None:
    """Connect the processes of a mesh; must be called in each of them.

    Args:
        mesh: None for a mesh over the devices of all processes.
        peer_timeout: see `EngineConfig`, which validates it once errors can be reported to all processes.

    Returns:
        The group, or None if all devices of the mesh belong to this process.

    Raises:
        ConfigError: the mesh has devices of some processes only, or none of this one.
        DistributedError: a process did not join, or could not connect.
    """
    if jax.process_count() == 1:
        return None
    if mesh is not None:
        if {device.process_index for device in mesh.devices.flat} == {jax.process_index()}:
            return None
        check_mesh(mesh)
    counts = Counter(device.process_index for device in jax.devices())
    if other := next((process for process in counts if counts[process] != counts[0]), None):
        raise ConfigError(
            f"process {other} has {counts[other]} device(s), process 0 has {counts[0]}; give all the same number "
            "(CUDA_VISIBLE_DEVICES, or on a CPU --xla_force_host_platform_device_count in XLA_FLAGS)"
        )
    known = isinstance(peer_timeout, int | float) and 0 < peer_timeout < 1e9
    return _lead(float(peer_timeout) if known else PEER_TIMEOUT) if jax.process_index() == 0 else _call()


def guard(group: Group | None) -> AbstractContextManager[None]:
    """Report exceptions raised inside to the other processes, if there are any."""
    return nullcontext() if group is None else group.guard()


def check_mesh(mesh: Mesh) -> None:
    """Check that a mesh has devices of every process.

    Raises:
        ConfigError: it has not; names the missing processes.
    """
    held = {device.process_index for device in mesh.devices.flat}
    if missing := sorted(set(range(jax.process_count())) - held):
        raise ConfigError(
            f"tensor_parallel_size: a mesh of {mesh.size} device(s) has none of process(es) {missing}; there are "
            f"{jax.device_count()} devices on {jax.process_count()} processes: use them all, or pass a mesh over "
            "jax.local_devices() for a model of this process alone"
        )


def _lead(peer_timeout: float) -> Group:
    """Invite the other processes and accept their connections, on process 0."""
    token, hosts = secrets.token_bytes(16), _hosts()
    with _listener(local=hosts == [LOCAL]) as listener:
        invitation = {"hosts": hosts, "port": listener.getsockname()[1], "token": token.hex(), "limit": peer_timeout}
        data = np.frombuffer(json.dumps(invitation).encode().ljust(INVITATION_BYTES), np.uint8)
        multihost_utils.broadcast_one_to_all(data)
        peers, deadline = {}, time.monotonic() + JOIN_SECONDS
        while len(peers) < jax.process_count() - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, address = listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, jax.process_count())) - set(peers))
                raise DistributedError(
                    f"process(es) {missing} did not connect to {hosts}, port {invitation['port']}, within "
                    f"{JOIN_SECONDS:g} s; allow TCP connections between the machines"
                ) from None
            try:
                process, pid = admit(connection, token)
            except (OSError, DistributedError) as error:
                log.warning("a connection from %s was refused: %s", address[0], error)
                connection.close()
                continue
            peers[process] = Peer(process, f"{address[0]}, pid {pid}", connection)
    return Group(0, [peers[process] for process in sorted(peers)], peer_timeout)


def _call() -> Group:
    """Connect to process 0, on any other process."""
    data = multihost_utils.broadcast_one_to_all(np.zeros(INVITATION_BYTES, np.uint8))
    invitation: dict[str, Any] = json.loads(np.asarray(data).tobytes())
    failures = []
    for host in invitation["hosts"]:
        try:
            connection = socket.create_connection((host, invitation["port"]), timeout=10)
            introduce(connection, bytes.fromhex(invitation["token"]), jax.process_index(), os.getpid())
        except (OSError, DistributedError) as error:
            failures.append(f"{host}: {error}")
            continue
        return Group(jax.process_index(), [Peer(0, host, connection)], invitation["limit"])
    raise DistributedError(
        f"process {jax.process_index()} could not connect to process 0, port {invitation['port']} "
        f"({'; '.join(failures)}); allow TCP connections between the machines"
    )


def _listener(local: bool) -> socket.socket:
    """Open the listening socket, on the loopback interface only if all processes are on this machine."""
    if local:
        return socket.create_server((LOCAL, 0), backlog=1024)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=dual)


def _hosts() -> list[str]:
    """Return names and addresses under which others may reach this machine, most likely first."""
    found = []
    state = getattr(sys.modules.get("jax._src.distributed"), "global_state", None)
    # The others have reached JAX's coordinator, whose address has no public accessor.
    if address := getattr(state, "coordinator_address", None):
        host = address.rpartition(":")[0].strip("[]")
        if host in ("localhost", LOCAL, "::1"):
            return [LOCAL]
        found.append(host)
    found.append(socket.getfqdn())
    try:
        found += [entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing: selects the interface of the default route
            found.append(probe.getsockname()[0])
    except OSError as error:
        log.debug("addresses of this machine: %s", error)
    return list(dict.fromkeys(str(host) for host in found))
