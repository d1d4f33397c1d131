"""Fixtures: fail on failed steps, which the engine would hide by recomputing; and models over several devices."""

import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
from support import checkpoint
from support.tiny import config, shapes_of

from jaxinfer.engine.runner.runner import Runner
from jaxinfer.functional import split
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding.policy import Placement


@pytest.fixture(autouse=True)
def no_failed_steps(caplog):
    """Turn the engine's error log into a test failure."""
    with caplog.at_level(logging.ERROR, "jaxinfer"):
        yield
        failed = [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.ERROR]
    assert not failed, failed[0]


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Runner]:
    """Runner of a family's checkpoint over `tp` devices: the same weights for every mesh, read by the real loader.

    Eight query heads and two kv heads, which are repeated over four and eight devices; a vocabulary of 97, padded on
    all but one device.
    """

    @cache
    def folder(family: str, changes: str):
        own = config(family)
        every = {"num_key_value_heads": 8} if own["num_key_value_heads"] == own["num_attention_heads"] else {}
        hf = own | {"num_attention_heads": 8, **every} | json.loads(changes)
        return checkpoint.write(tmp_path_factory.mktemp(family), hf, with_tokenizer=False)

    @cache
    def made(family: str, tp: int, placement: str, pad_heads: bool, codes: str, changes: str) -> Runner:
        mesh, policy = make_mesh(tp), Placement(json.loads(placement))
        module = weights.load(folder(family, changes), mesh, placement=policy, pad_heads=pad_heads, progress=False)
        program, params = split(module, mesh, kv_cache_dtype=codes)
        return Runner(program, params, shapes_of(program))

    def runner(
        family: str = "llama",
        tp: int = 1,
        placement: Mapping[str, str] | None = None,
        *,
        pad_heads: bool = False,
        kv_cache_dtype: str = "auto",
        **changes: Any,
    ) -> Runner:
        return made(family, tp, json.dumps(placement or {}), pad_heads, kv_cache_dtype, json.dumps(changes))

    return runner
