"""Frames and arrays between processes, and invalid ones."""

import secrets
import socket
import struct
import threading

import ml_dtypes
import numpy as np
import pytest

from jaxinfer.distributed import wire
from jaxinfer.distributed.wire import Kind, Peer, admit, introduce, pack_arrays, unpack_arrays
from jaxinfer.errors import DistributedError


@pytest.fixture
def pair():
    """Both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ends = socket.create_connection(listener.getsockname()), listener.accept()[0]
    yield ends
    for end in ends:
        end.close()


def test_arrays_come_back_as_they_were():
    arrays = [
        np.arange(7, dtype=np.int32),
        np.array(-3, np.int32),
        np.zeros((2, 0, 3), np.float32),
        np.array([True, False]),
        np.array([[1.5, -2]], ml_dtypes.bfloat16),
        np.arange(12, dtype=np.uint8).reshape(3, 4).T,
    ]
    back = unpack_arrays(pack_arrays(arrays))
    assert [(a.dtype, a.shape, a.tolist()) for a in back] == [(a.dtype, a.shape, a.tolist()) for a in arrays]
    assert all(a.flags.aligned for a in back) and unpack_arrays(b"") == []


@pytest.mark.parametrize(
    "data",
    [
        b"\x00",
        b"\xff\x00",
        pack_arrays([np.arange(4, dtype=np.int32)])[:-1],
        b"\x00\x02\x01\x00\x00\x00",
        b"\x00\x01" + struct.pack("<I", 0xFFFFFFFF),
    ],
)
def test_invalid_array_bytes_are_refused(data: bytes):
    with pytest.raises(DistributedError, match=f"a frame of {len(data)} bytes has no valid array"):
        unpack_arrays(data)


def test_frames_keep_their_order_and_beats_come_between(pair):
    sender, receiver = Peer(1, "here", pair[0]), Peer(0, "there", pair[1])
    sender.send(Kind.KEY, b"abc")
    sender.beat()
    sender.send_json(Kind.SHARE, {"x": [1, None]})
    assert [receiver.receive() for _ in range(3)] == [
        (Kind.KEY, b"abc"),
        (Kind.BEAT, b""),
        (Kind.SHARE, b'{"x": [1, null]}'),
    ]


@pytest.mark.parametrize("frame", [struct.pack("<BI", 99, 0), struct.pack("<BI", Kind.LAUNCH, wire.MAX_BYTES + 1)])
def test_invalid_frames_are_refused(pair, frame: bytes):
    pair[0].sendall(frame)
    with pytest.raises(DistributedError, match="process 0 .there. sent an invalid frame"):
        Peer(0, "there", pair[1]).receive()


def test_a_closed_connection_raises(pair):
    pair[0].sendall(b"\x01")
    pair[0].close()
    with pytest.raises(ConnectionError):
        Peer(0, "there", pair[1]).receive()


@pytest.mark.parametrize("knows", [True, False])
def test_both_sides_have_to_know_the_token(pair, knows: bool):
    token, found = secrets.token_bytes(16), []

    def call() -> None:
        try:
            introduce(pair[0], token if knows else b"another", 3, 77)
            found.append("in")
        except (OSError, DistributedError) as error:
            found.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    if knows:
        assert admit(pair[1], token) == (3, 77)
    else:
        with pytest.raises(DistributedError, match="does not know the token"):
            admit(pair[1], token)
        pair[1].close()
    caller.join(10)
    assert (found == ["in"]) == knows


def test_process_0_must_prove_that_it_knows_the_token(pair):
    def pretend() -> None:
        pair[1].sendall(b"n" * 16)
        wire.read(pair[1], 8 + 16 + 32)
        pair[1].sendall(b"x" * 32)

    liar = threading.Thread(target=pretend)
    liar.start()
    with pytest.raises(DistributedError, match="the listening process does not know the token"):
        introduce(pair[0], b"token", 1, 2)
    liar.join(10)
