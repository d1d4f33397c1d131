"""One tiny checkpoint and one LLM for all fault tests; other host settings are laid over it without compiling."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from support import checkpoint

from jaxinfer import LLM
from jaxinfer.engine.engine import Engine

SETTINGS = dict(
    max_model_len=128,
    max_num_seqs=8,
    max_num_batched_tokens=32,
    block_size=4,
    decode_buckets=(8,),
    prefill_buckets=(32,),
    kv_cache_memory_bytes=1 << 20,
    check_invariants=True,
    use_tqdm=False,
    decode_steps=1,
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint with tokenizer, chat template and two EOS ids."""
    return checkpoint.write(tmp_path_factory.mktemp("tiny"), scale=4.0)


@pytest.fixture(scope="session")
def make_llm(folder) -> Callable[..., LLM]:
    """An LLM of its own; it compiles its own steps."""
    return lambda **settings: LLM(folder, **SETTINGS | settings)


@pytest.fixture(scope="session")
def shared_llm(make_llm) -> Iterator[LLM]:
    """The LLM that `llm` hands out; a file that is about another model has its own."""
    with make_llm() as llm:
        yield llm


@pytest.fixture
def llm(shared_llm) -> Iterator[LLM]:
    """The shared LLM with nothing cached; afterwards nothing may run and no block be held."""
    shared_llm.reset_prefix_cache()
    yield shared_llm
    assert_idle(shared_llm)


def settle(llm: LLM) -> None:
    """Wait until the engine has taken what was put into its queue: streams that were closed, calls that were
    interrupted."""
    llm._thread.run(lambda: None)


def assert_idle(llm: LLM) -> None:
    """Check that nothing runs, waits or is held, on the engine's thread, as no other may use the block pool."""
    llm._thread.run(_assert_idle, llm._engine)


def _assert_idle(engine: Engine) -> None:
    while engine.has_work and not engine.requests:  # a last step in flight of what was aborted
        engine.step()
    assert not engine.requests and not engine.has_work
    assert int(engine.manager.pool.num_held) == 0
    assert engine.scheduler.encoder_cache.pool.num_pinned == 0
    engine.manager.check()


@pytest.fixture
def host(llm) -> Callable[..., Any]:
    """`with host(pool_blocks=3): ...`: the shared LLM with other settings of the host."""

    @contextmanager
    def laid_over(**settings: Any) -> Iterator[Engine]:
        before = llm._engine
        before.runner.reset()
        llm._thread.engine = Engine(before.runner, replace(before.settings, **settings))
        try:
            yield llm._engine
            assert_idle(llm)
        finally:
            llm._thread.engine = before
            before.runner.reset()
            before.reset_prefix_cache()

    return laid_over
