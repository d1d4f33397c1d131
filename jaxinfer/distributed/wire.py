"""Wire format between processes: typed frames of bytes; arrays as shapes and raw bytes, never pickle.

Everything is validated when read: known frame kinds, plausible lengths, arrays that fill their frame exactly.
"""

import hashlib
import hmac
import json
import math
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import ml_dtypes
import numpy as np

from jaxinfer.errors import DistributedError

MAX_BYTES = 1 << 30
"""Maximum bytes of a frame: the integers of a step take kilobytes, the pixels of a prompt's images megabytes."""
HANDSHAKE_SECONDS = 20.0
DTYPES = tuple(
    np.dtype(kind)
    for kind in (
        np.int32,
        np.float32,
        np.bool_,
        np.uint8,
        np.int8,
        np.uint32,
        np.int64,
        np.float16,
        ml_dtypes.bfloat16,
        np.float64,
    )
)
"""Supported array dtypes, encoded by index."""
_FRAME, _ARRAY, _HELLO, _NONCE = struct.Struct("<BI"), struct.Struct("<BB"), struct.Struct("<II"), 16


class Kind(IntEnum):
    """Kind of a frame."""

    BEAT = 0
    """Heartbeat."""
    SHARE = 1
    """A process's value for `Group.all_gather`, or the values of all processes."""
    KEY = 2
    """Program key that the next number stands for."""
    LAUNCH = 3
    """A program is dispatched: number of its key, and arrays."""
    CHECK = 4
    """Result of a launch: its number and a digest."""
    WARM = 5
    """Programs to compile."""
    FAIL = 6
    """Description of a failure: all processes end."""
    END = 7
    """Regular end."""
    CACHE = 8
    """Device memory is freed or allocated: `FREED`, `ALLOCATED` or `DROPPED`."""
    RELEASE = 9
    """`LLM.follow` returns."""
    FOLLOWS = 10
    """The sender has called `LLM.follow`."""


FREED, ALLOCATED, DROPPED = b"0", b"1", b"2"
"""States of the cache, and that the weights are freed as well."""


def pack_arrays(arrays: Sequence[np.ndarray]) -> bytes:
    """Encode arrays one after another: dtype index, number of axes, sizes, bytes."""
    parts = []
    for array in map(np.asarray, arrays):
        parts.append(_ARRAY.pack(DTYPES.index(array.dtype), array.ndim))
        parts.append(struct.pack(f"<{array.ndim}I", *array.shape))
        parts.append(array.tobytes())
    return b"".join(parts)


def unpack_arrays(data: bytes) -> list[np.ndarray]:
    """Decode the output of `pack_arrays`.

    Raises:
        DistributedError: the bytes are not valid arrays.
    """
    arrays, at = [], 0
    try:
        while at < len(data):
            number, axes = _ARRAY.unpack_from(data, at)
            shape = struct.unpack_from(f"<{axes}I", data, at + _ARRAY.size)
            at += _ARRAY.size + 4 * axes
            kind, count = DTYPES[number], math.prod(shape)
            arrays.append(np.frombuffer(data, kind, count, at).reshape(shape).copy())  # copied for alignment
            at += count * kind.itemsize
    except (struct.error, IndexError, ValueError) as error:
        raise DistributedError(f"a frame of {len(data)} bytes has no valid array at byte {at}: {error}") from error
    return arrays


class Peer:
    """Connection to another process. Several threads may send; one receives."""

    def __init__(self, process: int, where: str, connection: socket.socket):
        self.process, self.where, self._socket = process, where, connection
        self._lock = threading.Lock()
        self.last_heard = time.monotonic()
        """Time of the last received frame (`time.monotonic`)."""
        self.ended = False
        """Whether the peer has sent END."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)

    def __str__(self) -> str:
        return f"process {self.process} ({self.where})"

    def send(self, kind: Kind, data: bytes = b"") -> None:
        """Send a frame, blocking while the socket buffer is full.

        Raises:
            OSError: the connection is lost.
            DistributedError: the frame is too long.
        """
        if len(data) > MAX_BYTES:
            raise DistributedError(f"a message of {len(data)} bytes exceeds the limit of {MAX_BYTES} bytes")
        with self._lock:
            self._socket.sendall(_FRAME.pack(kind, len(data)) + data)

    def send_json(self, kind: Kind, value: Any) -> None:
        """Send a value as JSON; raises as `send`."""
        self.send(kind, json.dumps(value).encode())

    def beat(self) -> None:
        """Send a heartbeat, unless a frame is being sent or the socket buffer is full."""
        if self._lock.acquire(blocking=False):
            try:
                poll = select.poll()
                poll.register(self._socket, select.POLLOUT)
                if poll.poll(0):
                    self._socket.sendall(_FRAME.pack(Kind.BEAT, 0))
            finally:
                self._lock.release()

    def receive(self) -> tuple[Kind, bytes]:
        """Receive the next frame.

        Raises:
            OSError: the connection is lost; end of file raises ConnectionError.
            DistributedError: the bytes are not a valid frame.
        """
        kind, size = _FRAME.unpack(read(self._socket, _FRAME.size))
        self.last_heard = time.monotonic()
        if kind not in set(Kind) or size > MAX_BYTES:
            raise DistributedError(f"{self} sent an invalid frame: kind {kind}, {size} bytes")
        return Kind(kind), read(self._socket, size)

    def close(self) -> None:
        """Close the connection, and wake a thread blocked in `receive`."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # already closed
        self._socket.close()


def read(connection: socket.socket, size: int) -> bytes:
    """Read `size` bytes.

    Raises:
        ConnectionError: the connection was closed before.
    """
    data, at = bytearray(size), 0
    while at < size:
        count = connection.recv_into(memoryview(data)[at:])
        if not count:
            raise ConnectionError("the connection was closed")
        at += count
    return bytes(data)


def _answer(token: bytes, *parts: bytes) -> bytes:
    return hmac.digest(token, b"".join(parts), hashlib.sha256)


def admit(connection: socket.socket, token: bytes) -> tuple[int, int]:
    """Authenticate a connecting process, on process 0: both sides prove that they know the token.

    Returns:
        Process number and pid.

    Raises:
        OSError: the connection is lost or timed out.
        DistributedError: the other side does not know the token.
    """
    connection.settimeout(HANDSHAKE_SECONDS)
    nonce = secrets.token_bytes(_NONCE)
    connection.sendall(nonce)
    hello = read(connection, _HELLO.size + _NONCE)
    if not hmac.compare_digest(read(connection, 32), _answer(token, nonce, hello)):
        raise DistributedError("the connecting process does not know the token")
    connection.sendall(_answer(token, hello, nonce))
    process, pid = _HELLO.unpack_from(hello)
    return process, pid


def introduce(connection: socket.socket, token: bytes, process: int, pid: int) -> None:
    """Authenticate to process 0, the other side of `admit`; raises as it does."""
    connection.settimeout(HANDSHAKE_SECONDS)
    nonce = read(connection, _NONCE)
    hello = _HELLO.pack(process, pid) + secrets.token_bytes(_NONCE)
    connection.sendall(hello + _answer(token, nonce, hello))
    if not hmac.compare_digest(read(connection, 32), _answer(token, hello, nonce)):
        raise DistributedError("the listening process does not know the token")
