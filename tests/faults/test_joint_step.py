"""A joint step that fails when it runs."""

import pytest
from support.cases import EDGES, alone, mixed
from support.tiny import joint_runner, make_engine, random_runner, run

pytestmark = pytest.mark.xdist_group("llama")


def test_one_that_fails_is_two_steps_from_then_on(monkeypatch, caplog):
    two = random_runner()
    engine = make_engine(joint_runner(two))
    replay, failures = engine.runner.replay, []

    def failing(key, arrays):
        if getattr(key, "decodes", 0):
            failures.append(key)
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return replay(key, arrays)

    monkeypatch.setattr(engine.runner, "replay", failing)
    wanted = mixed(EDGES)
    assert run(engine, wanted) == alone(two, wanted)
    assert failures and len(failures) == len(set(failures)), "a program is tried once"
    assert all(s.finish_reason in ("length", "stop") and not s.failures for r in wanted for s in r.sequences)
    assert "run as two steps from now on" in caplog.text
