"""Replay of steps over several processes: process 0 schedules, the others dispatch the same programs.

Each process has a `Runner` over its own shards of the same arrays. Process 0 sends every dispatch, the program's key
and the host arrays, before it makes it; the others make the same dispatches in the same order, as their collectives
require. This module does not depend on what a program does: its key says what state it takes and returns
(`runner.keys.Key`).

Sampled tokens are compared: process 0 sends a digest of them with a later dispatch, once they are there, so nothing
waits for it. A sharded output head gives all devices the same tokens even if one device's hidden states are wrong, so a
summary of the hidden states is sent as well (`multihost.divergence`).
"""

import hashlib
import json
import struct
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import asdict
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

import jax
import numpy as np

from jaxinfer.distributed.group import Group
from jaxinfer.distributed.wire import ALLOCATED, DROPPED, FREED, Kind, pack_arrays, unpack_arrays
from jaxinfer.engine.multihost import divergence
from jaxinfer.engine.runner.keys import Key
from jaxinfer.engine.runner.logits import SampleLogits
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.runner.step_sampling import Sampled
from jaxinfer.engine.runner.warmup import warm_up
from jaxinfer.errors import DistributedError

KEYS = {kind.__name__: kind for kind in get_args(Key)}
_NUMBER, _CHECK, _DIGEST = struct.Struct("<I"), struct.Struct(f"<I16s{divergence.GROUPS + 1}f"), 16


def encode_key(key: Key) -> bytes:
    """Encode a key as JSON: its class name and fields."""
    return json.dumps([type(key).__name__, asdict(key)]).encode()


def decode_key(data: bytes) -> Key:
    """Decode a key, checking every field; the inverse of `encode_key`.

    Raises:
        DistributedError: the data is not a valid key.
    """
    try:
        name, values = json.loads(data)
        kind = KEYS[name]
        hints = get_type_hints(kind)
        return kind(**{field: _typed(value, hints[field]) for field, value in values.items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DistributedError(f"process 0 sent an invalid program key: {data[:200]!r} ({error})") from error


def _typed(value: Any, hint: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if get_origin(hint) is tuple:
        return tuple(_typed(one, get_args(hint)[0]) for one in value)
    if type(value) not in (get_args(hint) or (hint,)):
        raise ValueError(f"{value!r} is not of type {hint}")
    return value


def digest(tokens: jax.Array) -> bytes:
    """Hash sampled tokens, which are replicated in every process; blocks until they are computed."""
    return hashlib.blake2b(np.ascontiguousarray(tokens).tobytes(), digest_size=_DIGEST).digest()


class Leader:
    """Process 0: sends its dispatches to the other processes."""

    def __init__(self, group: Group):
        self._group = group
        self._keys: dict[Key, int] = {}
        self._launches = 0
        self._sampled: deque[tuple[int, Sampled]] = deque()
        self.followed = self.has_released = False
        """Whether the other processes replay what this one dispatches, as far as is known here; and whether they did,
        and were let go."""

    def release(self) -> None:
        """Let `follow` return in the other processes once they have replayed and compared everything.

        Raises:
            DistributedError: a process has died or diverged, or all have ended.
        """
        self._wait_until_followed()
        self._compare(wait=True)
        self._group.broadcast(Kind.RELEASE)
        self.followed, self.has_released = False, True
        self._launches = 0  # the next call of `follow` counts anew, and knows no keys
        self._keys.clear()

    def _wait_until_followed(self) -> None:
        """Wait until all other processes have called `follow`, so that all dispatch in the same order."""
        if not self.followed:
            for peer in self._group.peers:
                self._group.take(peer, Kind.FOLLOWS)
            self.followed, self.has_released = True, False

    def launch(self, key: Key, arrays: Sequence[np.ndarray]) -> None:
        """Send a program that is about to be dispatched with these arrays.

        Raises:
            DistributedError: a process has died or diverged, or all have ended.
        """
        self._wait_until_followed()
        self._compare(wait=False)
        if key not in self._keys:
            self._keys[key] = len(self._keys)
            self._group.broadcast(Kind.KEY, encode_key(key))
        self._launches += 1
        self._group.broadcast(Kind.LAUNCH, _NUMBER.pack(self._keys[key]) + pack_arrays(arrays))

    def watch(self, result: Sampled | None) -> None:
        """Queue the result of a dispatch to be compared once it is computed."""
        if result is not None:
            result.summary.copy_to_host_async()
            self._sampled.append((self._launches, result))

    def warm(self, sampling: Collection[str], threads: int | None) -> None:
        """Have the other processes compile the programs that this one is about to compile; `warmed` waits for them."""
        self._wait_until_followed()
        self._group.broadcast(Kind.WARM, json.dumps([list(sampling), threads]).encode())

    def warmed(self) -> None:
        """Wait until all processes have compiled."""
        self._group.gather()

    def cache(self, state: bytes) -> None:
        """Have the other processes free or allocate memory: `FREED`, `ALLOCATED` or `DROPPED`."""
        self._wait_until_followed()
        self._group.broadcast(Kind.CACHE, state)

    def give_up(self, error: BaseException) -> None:
        """End all processes after a failed step, as their states are no longer known to be equal.

        After an interrupt the others end without an error and the caller re-raises it; the engine serves no more
        requests.

        Raises:
            DistributedError: why the processes end, unless `error` is an interrupt.
        """
        if not isinstance(error, Exception):
            self._group.end_quietly()
            return
        raise self._group.failed(error) from error

    def end(self) -> None:
        """End all processes once they have replayed and compared everything.

        Raises:
            DistributedError: a process failed before the end. It is raised only once.
        """
        if self._group.failure_raised or self._group.has_left:
            return
        try:
            self._compare(wait=True)
        except Exception as error:
            raise self._group.failed(error) from error
        self._group.end()

    def _compare(self, *, wait: bool) -> None:
        while self._sampled and (wait or self._sampled[0][1].summary.is_ready()):
            number, sampled = self._sampled.popleft()
            self._group.broadcast(
                Kind.CHECK, _CHECK.pack(number, digest(sampled.tokens), *divergence.local(sampled.summary)[0])
            )


def follow(runner: Runner, group: Group) -> None:
    """Run any other process: dispatch what process 0 dispatches, until it ends or releases this one.

    Raises:
        DistributedError: a process has died or diverged.
    """
    with group.guard():
        _Follower(runner, group).run()


class _Follower:
    def __init__(self, runner: Runner, group: Group):
        self._runner, self._group = runner, group
        self._keys: list[Key] = []
        self._launches = 0
        self._sampled: dict[int, tuple[Key, Sampled]] = {}

    def run(self) -> None:
        actions = {
            Kind.KEY: self._learn,
            Kind.LAUNCH: self._launch,
            Kind.CHECK: self._check,
            Kind.WARM: self._warm,
            Kind.CACHE: self._cache,
        }
        self._group.released = False
        self._group.peers[0].send(Kind.FOLLOWS)
        while True:
            kind, data = self._group.take(self._group.peers[0], *actions, Kind.RELEASE, Kind.END)
            if kind == Kind.RELEASE:
                self._group.released = True
                return
            if kind == Kind.END:
                self._group.answer_end()
                return
            actions[kind](data)

    def _learn(self, data: bytes) -> None:
        self._keys.append(decode_key(data))

    def _launch(self, data: bytes) -> None:
        (number,) = _NUMBER.unpack_from(data)
        if number >= len(self._keys):
            raise DistributedError(f"process 0 sent key number {number}, but only {len(self._keys)} keys are known")
        self._launches += 1
        key = self._keys[number]
        result = self._runner.replay(key, unpack_arrays(data[_NUMBER.size :]))
        if isinstance(key, SampleLogits):
            self._runner.forget_pending()
        if result is not None:
            self._sampled[self._launches] = key, result

    def _check(self, data: bytes) -> None:
        number, expected, *reference = _CHECK.unpack(data)
        key, sampled = self._sampled.pop(number)
        distance = divergence.max_distance(divergence.local(sampled.summary), np.array(reference, np.float32))
        what = None
        if digest(sampled.tokens) != expected:
            what = "sampled different tokens"
        elif not distance <= divergence.TOLERANCE:
            what = (
                f"computed different hidden states (relative distance {distance:.2g}; rounding gives at most "
                f"{divergence.TOLERANCE:g})"
            )
        if what is not None:
            self._group.fail(
                f"process {self._group.process} has diverged from process 0: launch {number} ({key}) {what}; its "
                "weights, programs or devices differ"
            )
            raise self._group.error()

    def _cache(self, data: bytes) -> None:
        actions = {FREED: self._runner.release, ALLOCATED: self._runner.reset, DROPPED: self._runner.drop_weights}
        actions[data]()

    def _warm(self, data: bytes) -> None:
        sampling, threads = json.loads(data)
        made = warm_up(self._runner.prepare(sampling), sampling, threads=threads, use_tqdm=False)
        self._group.peers[0].send_json(Kind.SHARE, made.compiled)
