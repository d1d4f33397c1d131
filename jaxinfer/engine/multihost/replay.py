"""Several processes, one engine: process 0 plans, the others dispatch what it dispatches.

Each has a `Runner` over its own part of the same arrays. Process 0 sends every dispatch, the key of its program and the
arrays of the host, before it makes it; the others make the same ones in the same order, as the collectives inside need.
Nothing here knows what a program does: what its key takes and gives says that (`engine.programs.Key`).

What a step has sampled is compared: process 0 sends a digest of the tokens with a later dispatch, when they are there,
so nobody waits for it. A divided head gives all devices the same tokens even where one went astray before it; therefore
a summary of the hidden states goes with it (`engine.drift`).
"""

import hashlib
import json
import struct
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import asdict
from enum import Enum
from typing import Any, get_args, get_type_hints

import jax
import numpy as np

from jaxinfer.distributed.group import Group
from jaxinfer.distributed.wire import Kind, pack_arrays, unpack_arrays
from jaxinfer.engine.multihost import divergence
from jaxinfer.engine.runner.programs import Key
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.runner.steps import Sampled
from jaxinfer.engine.runner.warmup import warm_up
from jaxinfer.errors import DistributedError

KEYS = {kind.__name__: kind for kind in get_args(Key)}
_NUMBER, _CHECK, _DIGEST = struct.Struct("<I"), struct.Struct(f"<I16s{divergence.GROUPS + 1}f"), 16


def encode_key(key: Key) -> bytes:
    """A key as JSON: its kind and its fields."""
    return json.dumps([type(key).__name__, asdict(key)]).encode()


def decode_key(data: bytes) -> Key:
    """The reverse of `encode_key`, every field checked.

    Raises:
        DistributedError: what is none.
    """
    try:
        name, values = json.loads(data)
        kind = KEYS[name]
        hints = get_type_hints(kind)
        return kind(**{field: _typed(value, hints[field]) for field, value in values.items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DistributedError(f"process 0 sent what is no key of a program: {data[:200]!r} ({error})") from error


def _typed(value: Any, hint: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if type(value) not in (get_args(hint) or (hint,)):
        raise ValueError(f"{value!r} is no {hint}")
    return value


def digest(tokens: jax.Array) -> bytes:
    """Of sampled tokens, whole in every process; waits for them."""
    return hashlib.blake2b(np.ascontiguousarray(tokens).tobytes(), digest_size=_DIGEST).digest()


class Leader:
    """Process 0: tells the others what it dispatches."""

    def __init__(self, group: Group):
        self._group = group
        self._keys: dict[Key, int] = {}
        self._launches = 0
        self._sampled: deque[tuple[int, Sampled]] = deque()

    def launch(self, key: Key, arrays: Sequence[np.ndarray]) -> None:
        """A program is about to be dispatched with these arrays.

        Raises:
            DistributedError: a process has died or diverged, or all have ended.
        """
        self._compare(wait=False)
        if key not in self._keys:
            self._keys[key] = len(self._keys)
            self._group.tell(Kind.KEY, encode_key(key))
        self._launches += 1
        self._group.tell(Kind.LAUNCH, _NUMBER.pack(self._keys[key]) + pack_arrays(arrays))

    def watch(self, result: Sampled | None) -> None:
        """What the dispatch will give: compared once it is there."""
        if result is not None:
            result.summary.copy_to_host_async()
            self._sampled.append((self._launches, result))

    def warm(self, sampling: Collection[str], threads: int | None) -> None:
        """Has the others compile what this process is about to; `warmed` waits for them."""
        self._group.tell(Kind.WARM, json.dumps([list(sampling), threads]).encode())

    def warmed(self) -> None:
        """Waits until all have compiled."""
        self._group.collect()

    def give_up(self, error: BaseException) -> None:
        """After a failed step: the state of all processes is no longer known to be the same, so none goes on.

        An interrupt ends the others in order, and the caller raises it on; the engine serves no more.

        Raises:
            DistributedError: why they end, where the error is none of the user's.
        """
        if not isinstance(error, Exception):
            self._group.end_quietly()
            return
        raise self._group.failed(error) from error

    def end(self) -> None:
        """All have replayed and compared everything, and end.

        Raises:
            DistributedError: they have not; not a second time.
        """
        if self._group.said or self._group.over:
            return
        try:
            self._compare(wait=True)
        except Exception as error:
            raise self._group.failed(error) from error
        self._group.end()

    def _compare(self, *, wait: bool) -> None:
        while self._sampled and (wait or self._sampled[0][1].summary.is_ready()):
            number, sampled = self._sampled.popleft()
            self._group.tell(
                Kind.CHECK, _CHECK.pack(number, digest(sampled.tokens), *divergence.local(sampled.summary)[0])
            )


def follow(runner: Runner, group: Group) -> None:
    """Any other process: dispatches what process 0 does, until that ends.

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
        actions = {Kind.KEY: self._learn, Kind.LAUNCH: self._launch, Kind.CHECK: self._check, Kind.WARM: self._warm}
        while True:
            kind, data = self._group.take(self._group.peers[0], *actions, Kind.END)
            if kind == Kind.END:
                self._group.answer_end()
                return
            actions[kind](data)

    def _learn(self, data: bytes) -> None:
        self._keys.append(decode_key(data))

    def _launch(self, data: bytes) -> None:
        (number,) = _NUMBER.unpack_from(data)
        if number >= len(self._keys):
            raise DistributedError(f"process 0 sent key {number} of {len(self._keys)}")
        self._launches += 1
        result = self._runner.replay(self._keys[number], unpack_arrays(data[_NUMBER.size :]))
        if result is not None:
            self._sampled[self._launches] = self._keys[number], result

    def _check(self, data: bytes) -> None:
        number, expected, *reference = _CHECK.unpack(data)
        key, sampled = self._sampled.pop(number)
        distance = divergence.apart(divergence.local(sampled.summary), np.array(reference, np.float32))
        what = None
        if digest(sampled.tokens) != expected:
            what = "has sampled other tokens there"
        elif not distance <= divergence.MOST:
            limit = f"rounding makes {divergence.MOST:g} at most"
            what = f"comes to other hidden states there (by {distance:.2g} of their size; {limit})"
        if what is not None:
            self._group.fail(
                f"process {self._group.process} has diverged from process 0: launch {number} ({key}) {what}; its "
                "weights, "
                "its programs or its device are not the same"
            )
            raise self._group.error()

    def _warm(self, data: bytes) -> None:
        sampling, threads = json.loads(data)
        made = warm_up(self._runner.prepare(sampling), sampling, threads=threads, use_tqdm=False)
        self._group.peers[0].send_json(Kind.SHARE, made.compiled)
