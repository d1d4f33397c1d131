"""Block tables on the device equal those of the host for every running row."""

import numpy as np
import pytest
from support.cases import EDGES, alone, mixed
from support.tiny import CHUNK, make_engine, make_request, prompt, run

from jaxinfer.engine.runner import launches
from jaxinfer.engine.runner.batch import batch_indices
from jaxinfer.engine.runner.row_params import RowParams
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("llama")


def check(engine):
    """Compare the blocks of each row up to the end of the one being written."""
    device, tables = np.asarray(engine.runner.rows.tables), engine.manager.tables
    for row in tables.used():
        if row not in tables.unsent:
            own = tables.blocks[:, row]
            assert (device[:, row][own >= 0] == own[own >= 0]).all()


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("widths", [(256, 4096), (8, 16)])
def test_after_every_step(runner, monkeypatch, widths, steps):
    """With forks, preemption and prefix hits; split into pieces where a row has more entries than are sent at once."""
    monkeypatch.setattr(launches, "TABLE_WIDTHS", widths)
    engine = make_engine(runner, pool_blocks=26, decode_steps=steps)
    params = SamplingParams(temperature=0.3, seed=1, n=3, max_tokens=14)
    wanted = [*mixed(EDGES[-3:]), make_request("long", prompt(5 * CHUNK), params), make_request("n", prompt(9), params)]
    for request in wanted:
        engine.add(request)
    while engine.has_work:
        engine.step()
        check(engine)
    assert engine.scheduler.preempted > 0
    assert [[s.output_ids.tolist() for s in r.sequences] for r in wanted] == alone(runner, wanted)


def test_tables_are_sent_again_after_a_failed_step(runner, monkeypatch):
    """After a failure all entries are sent again, to empty tables."""
    engine = make_engine(runner)
    wanted = mixed(EDGES[-3:])
    expected = alone(runner, wanted)
    for request in wanted:
        engine.add(request)
    for _ in range(4):
        engine.step()
    runner.rows = runner.rows._replace(tables=runner.rows.tables + 1)
    engine.recovery.recover(RuntimeError("device lost"))
    assert not np.asarray(runner.rows.tables).any()
    while engine.has_work:
        engine.step()
        check(engine)
    assert [[s.output_ids.tolist() for s in r.sequences] for r in wanted] == expected


def test_rows_keep_their_index_if_all_fit():
    rows = np.array([5, 0, 3])
    assert batch_indices(rows, 8, 8).tolist() == [5, 0, 3]
    assert batch_indices(rows, 4, 8).tolist() == [0, 1, 2]


def test_row_parameters_are_those_of_the_current_sequence(runner):
    """A row's parameters are those of the sequence it currently holds."""
    params_by_row, edited = RowParams(4), SamplingParams(temperature=0, presence_penalty=0.5, logprobs=2, max_tokens=3)
    plain = make_request("a", prompt(4), SamplingParams(temperature=0, max_tokens=3)).sequences[0]
    other = make_request("b", prompt(5), edited).sequences[0]
    plain.row, other.row = 1, 2
    params_by_row.write([plain, other])
    assert params_by_row.needs(np.array([1]))[:2] == (Level.GREEDY, -1)
    assert params_by_row.needs(np.array([1, 2]))[:2] == (Level.EDITED, 2)
    assert params_by_row.needs(np.array([], np.int32))[:2] == (Level.GREEDY, -1)
    other.row = 1
    params_by_row.write([other])
    assert params_by_row.needs(np.array([1]))[:2] == (Level.EDITED, 2)


@pytest.mark.slow
def test_smaller_steps_gather_their_rows(runner):
    """A bucket with fewer sequences than there are rows reads the same tables."""
    small = Runner(
        runner.program,
        runner.params,
        runner.shapes.__class__(**runner.shapes.__dict__ | {"decode_buckets": (2, runner.shapes.rows)}),
    )
    wanted = mixed(EDGES[-2:])
    assert run(make_engine(small, decode_steps=4), wanted) == alone(runner, wanted)
