"""Render chat templates in worker processes with limits on time, memory and output length."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import marshal
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from jaxinfer.errors import ChatTemplateError
from jaxinfer.inputs import template_worker
from jaxinfer.inputs.template_worker import FAILED, MEMORY, NO_MEMORY, OK, TOO_LONG

TIMEOUT = 5.0
"""Time limit for rendering one conversation, in seconds."""
MAX_CHARS = 2**25
"""Maximum output of a template for one conversation, in characters."""
START_TIMEOUT = 60.0
"""Time limit for starting a process, in seconds; a start takes 0.1 s on an idle machine."""
IDLE = 2
"""Maximum number of idle processes kept for later calls."""
STARTING = "jaxinfer template"
"""Name of the threads that start processes."""

_lock = threading.Lock()
_idle: list[_Process] = []


def render(
    source: str, chat: list[dict[str, Any]], variables: dict[str, Any], field: str | None, timeout_s: float = TIMEOUT
) -> str:
    """Render one conversation.

    Args:
        source: Jinja source.
        chat: messages, as plain data.
        variables: further template variables, as plain data.
        field: field of the last message that the answer continues; None if the answer begins a new message.
        timeout_s: time limit, in seconds.

    Raises:
        ChatTemplateError: the template fails or exceeds a limit.
    """
    return _ask(("render", timeout_s, MAX_CHARS, source, chat, variables, field))


@functools.lru_cache(maxsize=256)
def message_forms(
    source: str, role: str, special_tokens: tuple[tuple[str, Any], ...], timeout_s: float = TIMEOUT
) -> str:
    """Return the content forms that a template accepts for a role, as letters of `template_worker.describe`.

    Raises:
        ChatTemplateError: as in `render`.
    """
    return _ask(("describe", timeout_s, MAX_CHARS, source, role, dict(special_tokens)))


def _ask(request: tuple[Any, ...]) -> str:
    """Send a request to a worker process and return its answer; kill the process if it does not answer in time."""
    seconds, most = request[1:3]
    try:
        data = marshal.dumps(request)
    except ValueError as error:
        raise ChatTemplateError(f"the messages cannot be given to the chat template: {error}") from error
    process = _take()
    try:
        status, text = process.ask(data, seconds)
    except TimeoutError:
        process.end()
        raise ChatTemplateError(
            f"the chat template did not finish in {seconds:g} s: pass another chat_template=, or a shorter "
            "conversation."
        ) from None
    except EOFError:
        code = process.end()
        raise ChatTemplateError(
            f"the process that rendered the chat template ended (exit status {code}): pass another chat_template=."
        ) from None
    except BaseException:  # such as KeyboardInterrupt: the pending answer must not reach the next request
        process.end()
        raise
    _give_back(process)
    if status == OK:
        return text
    raise ChatTemplateError(
        {
            FAILED: f"the chat template failed: {text}",
            TOO_LONG: f"the chat template wrote more than {most} characters, the most that a prompt may have.",
            NO_MEMORY: f"the chat template needed more than {MEMORY >> 20} MiB of memory: pass another chat_template=.",
        }.get(status, f"the chat template gave an answer of an unknown kind, {status}.")
    )


class _Process:
    """A running worker process (`template_worker`)."""

    def __init__(self) -> None:
        paths = _paths_of_jinja()
        if not sys.executable:
            raise ChatTemplateError(
                "chat templates run in a Python process of their own, but sys.executable is not set."
            )
        # -S skips the site module, so that no start-up code of the environment runs. A new session keeps Ctrl-C from
        # reaching the worker.
        command = [sys.executable, "-I", "-S", str(Path(template_worker.__file__)), *paths]
        self._popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._read = selectors.DefaultSelector()
        self._read.register(self._popen.stdout, selectors.EVENT_READ)
        self._started = False

    def ask(self, data: bytes, seconds: float) -> tuple[int, str]:
        """Send a request and wait for its answer, a status and a text.

        Raises:
            TimeoutError: the answer takes longer than `seconds`.
            EOFError: the process has ended.
        """
        try:
            if not self._started:
                self._receive(START_TIMEOUT)
                self._started = True
            self._send(data)
        except BrokenPipeError:
            raise EOFError from None
        return self._receive(seconds)

    def _send(self, data: bytes) -> None:
        self._popen.stdin.write(len(data).to_bytes(8, "little") + data)
        self._popen.stdin.flush()

    def _receive(self, seconds: float) -> tuple[int, str]:
        ends = time.monotonic() + seconds
        head = self._bytes(9, ends)
        size = int.from_bytes(head[1:], "little")
        if size > 4 * MAX_CHARS:
            raise EOFError
        return head[0], self._bytes(size, ends).decode("utf-8", "surrogatepass")

    def _bytes(self, count: int, ends: float) -> bytes:
        """Read `count` bytes of the answer; `ends`: deadline on the monotonic clock, in seconds."""
        made = bytearray()
        while len(made) < count:
            if not self._read.select(max(ends - time.monotonic(), 0)):
                raise TimeoutError
            piece = os.read(self._popen.stdout.fileno(), min(count - len(made), 1 << 20))
            if not piece:
                raise TimeoutError if self._popen.wait() == -getattr(signal, "SIGALRM", 0) else EOFError
            made += piece
        return bytes(made)

    def alive(self) -> bool:
        """Return whether the process is running."""
        return self._popen.poll() is None

    def end(self) -> int:
        """Kill the process, close its pipes and return its exit status."""
        with contextlib.suppress(OSError):
            self._popen.kill()
        code = self._popen.wait()
        self._read.close()
        with contextlib.suppress(OSError):  # closing flushes buffered data to a broken pipe
            self._popen.stdin.close()
        self._popen.stdout.close()
        return code

    def __del__(self) -> None:
        """Kill an unreferenced process, left by an interrupt while it was being started, taken or ended."""
        with contextlib.suppress(Exception):
            self.end()


def _take() -> _Process:
    """Return an idle process, or start one."""
    while True:
        with _lock:
            process = _idle.pop() if _idle else None
        if process is None:
            return _start()
        if process.alive():
            return process
        process.end()


def _start() -> _Process:
    """Start a process on a separate thread.

    On the main thread, an interrupt could come after `Popen` has started the process and before it has stored its id;
    the process would never be waited for.
    """
    made: SimpleQueue[_Process | Exception] = SimpleQueue()

    def start() -> None:
        try:
            made.put(_Process())
        except Exception as error:
            made.put(error)

    threading.Thread(target=start, name=STARTING, daemon=True).start()
    process = made.get()
    if isinstance(process, Exception):
        raise process
    return process


def _give_back(process: _Process) -> None:
    """Keep a process for later calls, or end it if `IDLE` processes are kept already."""
    with _lock:
        kept = len(_idle) < IDLE
        if kept:
            _idle.append(process)
    if not kept:
        process.end()


def _paths_of_jinja() -> list[str]:
    """Return the folders that a worker process must add to `sys.path` to import Jinja.

    Raises:
        ChatTemplateError: Jinja is not installed.
    """
    found = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    if not all(spec is not None and spec.origin for spec in found):
        raise ChatTemplateError("chat templates need jinja2: pip install 'jinja2>=3.1.6'")
    return [str(Path(spec.origin).parents[1]) for spec in found]


def _forget() -> None:
    """Drop all processes in a forked child: their pipes belong to the parent."""
    global _lock
    _lock = threading.Lock()
    _idle.clear()


@atexit.register
def end_all() -> None:
    """End all idle processes."""
    while _idle:
        _idle.pop().end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
