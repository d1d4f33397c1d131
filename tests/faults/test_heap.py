"""Frozen objects are not collected, so nothing may be frozen that keeps an LLM's weights alive."""

import ctypes
import gc
import os
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfer._utils import heap
from jaxinfer._utils.heap import freeze, thaw, trim

pytestmark = pytest.mark.xdist_group("faults")


class Holder:
    """Something in a reference cycle."""

    def __init__(self) -> None:
        self.me, self.llm = self, None


@pytest.fixture
def unfrozen():
    """Whatever the tests do, nothing stays frozen."""
    yield
    thaw()
    gc.unfreeze()


def test_thawing_finds_what_became_garbage_and_leaves_other_peoples_freezing_alone(unfrozen):
    holder = Holder()
    found = weakref.ref(holder)
    freeze()
    del holder
    gc.collect()
    assert found() is not None and gc.get_freeze_count() > 10_000
    thaw(collect=True)
    assert found() is None
    gc.freeze()
    frozen = gc.get_freeze_count()
    thaw(collect=True)
    assert gc.get_freeze_count() >= frozen > 10_000


def test_nothing_is_frozen_where_the_collector_is_off(unfrozen):
    before = gc.get_freeze_count()
    gc.disable()
    try:
        freeze()
        assert gc.get_freeze_count() == before
    finally:
        gc.enable()


def resident() -> int:
    """Return the bytes of memory that this process has from the operating system."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_freed_memory_below_a_block_in_use_is_returned():
    arrays = [np.ones(12_000) for _ in range(2_000)]  # 192 MB in blocks that glibc takes from its heap
    last = arrays.pop()
    del arrays[:]
    before = resident()
    trim()
    assert before - resident() > 100e6 and last.all()


def test_a_closed_llm_has_given_back_weights_and_cache(make_llm, unfrozen, monkeypatch):
    monkeypatch.setattr(heap, "freeze", freeze)
    gc.collect()
    before = len(jax.live_arrays())
    llm = make_llm()
    gc.disable()
    try:
        llm.close()
        assert len(jax.live_arrays()) <= before  # fewer, if another test's threads end meanwhile
    finally:
        gc.enable()


def test_an_llm_is_loaded_thawed_freezes_and_gives_back(make_llm, monkeypatch):
    calls = []
    monkeypatch.setattr(heap, "freeze", lambda: calls.append("freeze"))
    monkeypatch.setattr(heap, "thaw", lambda collect=False: calls.append("collect" if collect else "thaw"))
    with make_llm():
        assert calls == ["collect", "freeze"]
    assert calls == ["collect", "freeze", "collect"]
    llm = make_llm(freeze_gc=False)
    assert calls[3:] == ["collect"]
    del llm  # without closing it
    assert calls[3:] == ["collect", "thaw"]
