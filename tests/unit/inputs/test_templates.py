"""Test that time, memory and output limits hold for all chat templates, even inside a single C call."""

import contextlib
import os
import signal
import subprocess
import threading
import time

import pytest
from support.stepping import wait_until

from jaxinfer.errors import ChatTemplateError
from jaxinfer.inputs import templates

CHAT = [{"role": "user", "content": "hi"}]


def render(source, chat=CHAT, **more):
    return templates.render(source, chat, {"x": "x"}, None, **more)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ (range(80000)|batch(1)|list)|sum(start=[])|length }}",
        "{{ 10 ** (10 ** 9) }}",
        "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{{ ('a' * 300000).replace('a', 'aa').split('a') | map('trim') | sort | join(',') * 9 | int }}{{ 9 ** 9 ** 9 "
        "}}",
    ],
)
def test_what_takes_too_long_is_ended_and_other_threads_run_on(source):
    render("")  # start a worker process
    gaps, ended = [], threading.Event()

    def tick():
        last = time.monotonic()
        while not ended.wait(0.02):
            gaps.append(time.monotonic() - last)
            last += gaps[-1]

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    try:
        with pytest.raises(ChatTemplateError, match=r"did not finish in 0\.3 s|MiB of memory"):
            render(source, timeout_s=0.3)
    finally:
        ended.set()
        thread.join()
    assert time.monotonic() - start < 20 and max(gaps, default=0) < 10


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'x' * 2000000000 }}", "1024 MiB of memory"),
        ("{% for i in range(2000) %}{{ 'x' * 100000 }}{% endfor %}", f"more than {2**25} characters"),
        ("{{ 'x' * 40000000 }}", f"more than {2**25} characters"),
        (
            "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "1024 MiB of memory",
        ),
        ("{{ 'x'.center(3000000000) }}", "1024 MiB of memory"),
    ],
)
def test_what_is_too_large_is_never_made(source, message):
    with pytest.raises(ChatTemplateError, match=message):
        render(source)


def test_a_process_is_used_again_until_it_ends():
    assert render("{{ messages[0].content }}") == "hi"
    [*_, process] = templates._idle
    render("")
    assert templates._idle[-1] is process
    process._popen.kill()
    process._popen.wait()
    assert render("again") == "again" and process not in templates._idle


def test_a_process_that_ends_during_a_request_is_said(monkeypatch):
    process = templates._take()
    threading.Timer(0.2, process._popen.kill).start()
    monkeypatch.setattr(templates, "_take", lambda: process)
    with pytest.raises(ChatTemplateError, match="ended .exit status -9"):
        render("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")


def test_an_interrupt_ends_the_process(monkeypatch):
    process = templates._take()
    monkeypatch.setattr(templates, "_take", lambda: process)

    def interrupted(timeout):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        process, "_read", type("", (), {"select": staticmethod(interrupted), "close": lambda self: None})()
    )
    with pytest.raises(KeyboardInterrupt):
        render("")
    assert process._popen.returncode is not None and process not in templates._idle


def test_an_interrupt_in_the_midst_of_a_start_loses_no_process(monkeypatch):
    """An interrupt after the process has started and before `Popen` has stored its id must not leave a zombie."""
    fork, made = subprocess._fork_exec, []

    def interrupted(*args):
        made.append(fork(*args))
        signal.raise_signal(signal.SIGINT)
        return made[-1]

    monkeypatch.setattr(subprocess, "_fork_exec", interrupted)
    templates.end_all()
    for _ in range(3):
        with contextlib.suppress(KeyboardInterrupt):
            render("")
        for thread in threading.enumerate():
            if thread.name == templates.STARTING:
                thread.join()
        templates.end_all()  # the next turn starts a process of its own
    assert len(made) == 3
    for process in made:
        with pytest.raises(ChildProcessError):  # already ended and reaped
            os.waitpid(process, os.WNOHANG)


def test_threads_do_not_wait_for_each_other(monkeypatch):
    taken, take = [], templates._take
    monkeypatch.setattr(templates, "_take", lambda: taken.append(take()) or taken[-1])
    slow = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    errors = []

    def run():
        try:
            render(slow, timeout_s=100)
        except ChatTemplateError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(taken) == 2)
    assert render("{{ x }}") == "x"
    assert not errors, "the slow ones are still running"
    for process in taken[:2]:
        process._popen.kill()
    for thread in threads:
        thread.join()
    assert len(errors) == 2 and len(templates._idle) <= templates.IDLE


def test_odd_text_goes_through_whole():
    text = "\0 \ud800 é \U0001f600" * 1000
    assert render("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text
