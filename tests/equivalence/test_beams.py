"""Beam search: batching, chunks, preemption, windows, caches and sharing change no result, and beams share blocks."""

from functools import cache

import numpy as np
import pytest
from support import checkpoint
from support.beams import Found, beam_request, found, search
from support.cases import GREEDY, alone
from support.tiny import (
    BLOCK,
    CHUNK,
    CONFIG,
    HYBRIDS,
    ROWS,
    hybrid_runner,
    make_engine,
    make_request,
    prompt,
    random_runner,
    run,
    shapes_of,
)

from jaxinfer.engine.runner.runner import Runner
from jaxinfer.functional import split
from jaxinfer.kv import groups as kv_groups
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh

NEW, WIDTH, EOS = 14, 4, (7, 30, 61)
"""More than three blocks; half of the rows."""
HYBRID, RECURRENT = "five to one", "qwen3_next"

LLAMA = pytest.param("llama", marks=pytest.mark.xdist_group("llama"))
OTHERS = [pytest.param(name, marks=[pytest.mark.xdist_group(name), pytest.mark.slow]) for name in (HYBRID, RECURRENT)]
every_kind = pytest.mark.parametrize("name", [LLAMA, *OTHERS])
each_model = pytest.mark.parametrize("name", [LLAMA, OTHERS[0]])


def runner_of(name):
    return hybrid_runner(name) if name in HYBRIDS else random_runner(name)


@cache
def contiguous(name):
    paged = runner_of(name)
    return Runner(paged.program, paged.params, shapes_of(paged.program, contiguous=True))


def searches(lengths=(1, CHUNK, 2 * CHUNK + 2), **how):
    own = dict(new=NEW, width=WIDTH, eos=EOS) | how
    return [beam_request(str(i), prompt(length, i), **own) for i, length in enumerate(lengths)]


def by_hand(runner: Runner, ids: list[int], *, new: int, width: int, eos: tuple[int, ...]) -> Found:
    """Reference search: each beam of each step is a prompt of its own, nothing is shared or cached, and beams are
    lists.
    """
    running, ended = [([], 0.0)], []
    for length in range(1, new + 1):
        options = []
        for tokens, total in running:
            request = beam_request("one", [*ids, *tokens], 1, eos, width=ROWS)
            engine = make_engine(runner, prefix_caching=False)
            engine.add(request)
            offered = None
            while engine.has_work:
                engine.step()
            offered = request.beams.state.finished
            options += [(total + beam.logprob, [*tokens, int(beam.tokens[-1])]) for beam in offered]
        options = sorted(options, key=lambda option: -option[0])[: (1 + len(eos)) * width]
        done = [option for option in options[:width] if option[1][-1] in eos or length == new]
        ended = sorted([*ended, *((tokens, total / length) for total, tokens in done)], key=lambda beam: -beam[1])[
            :width
        ]
        running = [(tokens, total) for total, tokens in options if tokens[-1] not in eos][:width]
        if len(ended) == width and running[0][1] / length <= ended[-1][1]:
            break
    return ended


@pytest.mark.slow
@every_kind
def test_beams_equal_a_reference_search(name):
    runner, ids = runner_of(name), prompt(CHUNK + 1, 3)
    expected = by_hand(runner, ids, new=6, width=3, eos=EOS)
    [result] = search(make_engine(runner), [beam_request("all", ids, 6, EOS, width=3)])
    assert [tokens for tokens, _ in result] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([score for _, score in result], [score for _, score in expected], rtol=1e-5)


@each_model
@pytest.mark.parametrize(
    "host",
    [
        dict(budget=3),
        dict(prefix_caching=False),
        dict(block_sharing=False),
        dict(decode_steps=8),
    ],
    ids=str,
)
def test_host_settings_do_not_change_results(name, host):
    runner = runner_of(name)
    expected = search(make_engine(runner), searches())
    assert len({str(result) for result in expected}) == 3
    assert search(make_engine(runner, **host), searches()) == expected


@every_kind
def test_searches_in_a_batch_equal_searches_alone(name):
    """With rows for two of five searches and a few requests at a time; the requests' tokens are unchanged, too."""
    runner = runner_of(name)
    expected = [search(make_engine(runner), [request])[0] for request in searches((3, 5, 17, 30, 34))]
    engine, wanted = make_engine(runner), searches((3, 5, 17, 30, 34))
    others = [make_request(f"o{i}", prompt(9 * i + 1, 50 + i), GREEDY) for i in range(4)]
    expected_others = alone(runner, others)
    for one, other in zip([*wanted[1:], wanted[0]], [*others, None], strict=True):
        engine.add(one)
        if other is not None:
            engine.add(other)
    while engine.has_work:
        engine.step()
    for request, beams in zip(wanted, expected, strict=True):
        assert [tokens for tokens, _ in found(request)] == [tokens for tokens, _ in beams]
        # Other chunks of a prompt may change the last bit of a recurrent state, and with it that of a score.
        np.testing.assert_allclose([score for _, score in found(request)], [score for _, score in beams], rtol=1e-6)
    assert [[s.output_ids.tolist() for s in other.sequences] for other in others] == expected_others


def bound(runner, length, new=NEW, width=WIDTH):
    return kv_groups.blocks_of_beams(runner.program.layout.kinds, (length, length + new, 0), width, BLOCK, CHUNK)


@each_model
@pytest.mark.parametrize("caching", [True, False])
def test_preempted_equals_not_preempted(name, caching):
    """In a pool that just holds one of the searches, with others waiting."""
    runner = runner_of(name)
    expected = search(make_engine(runner), searches())
    engine = make_engine(runner, pool_blocks=bound(runner, 2 * CHUNK + 2), prefix_caching=caching)
    others = [make_request(f"o{i}", prompt(25, 60 + i), GREEDY) for i in range(3)]
    expected_others = alone(runner, others)
    assert run(engine, others) == expected_others
    for request in others:
        engine.add(make_request(f"again {request.id}", request.prompt.tolist(), GREEDY))
    assert search(engine, searches()) == expected
    assert engine.scheduler.preempted > 0


@each_model
@pytest.mark.parametrize("length", [CHUNK, 2 * CHUNK + 2])
def test_a_search_fits_into_its_computed_number_of_blocks(name, length):
    runner = runner_of(name)
    engine = make_engine(runner, pool_blocks=bound(runner, length))
    expected = search(make_engine(runner), searches([length]))
    assert search(engine, searches([length])) == expected
    assert engine.scheduler.preempted == 0


@each_model
def test_any_step_may_preempt_any_beam(name):
    """Preempted beams, one or all, wait for each other; it does not matter which."""
    runner = runner_of(name)
    expected = search(make_engine(runner), searches())
    random = np.random.default_rng(5)
    for _ in range(2):
        engine, wanted = make_engine(runner, prefix_caching=bool(random.integers(2))), searches()
        for request in wanted:
            engine.add(request)
        steps = 0
        while engine.has_work:
            engine.step()
            steps += 1
            assert steps < 2000, "the searches do not progress"
            for beam in engine.scheduler.rows.active:
                if random.random() < 0.04:
                    engine.scheduler.preempt(beam)
        assert [found(request) for request in wanted] == expected
        assert engine.scheduler.preempted > 0


@each_model
def test_beams_share_every_block_but_the_last_ones(name):
    """At each step the held blocks are those of the tree of beams, each counted once; copies are one batch."""
    runner = runner_of(name)
    engine, groups = make_engine(runner, prefix_caching=False), runner.program.layout.groups
    [request] = searches([2 * BLOCK + 2], eos=())
    engine.add(request)
    while engine.has_work:
        engine.step()
        running = [s for s in request.sequences if s.row >= 0]
        tables = engine.manager.tables
        if len(running) < WIDTH:
            continue
        for group in range(groups):
            named = tables.blocks[group, [s.row for s in running]]
            written = int(tables.lengths[running[0].row])
            # Beams share a block exactly if all their tokens up to the block's end are equal.
            for column in range(written // BLOCK):
                prefixes = {tuple(s.tokens[: (column + 1) * BLOCK].tolist()) for s in running}
                held = {int(block) for block in named[:, column]} - {-1}
                assert len(held) in (0, len(prefixes))
    assert int(engine.manager.pool.num_held) == 0


@pytest.mark.xdist_group("llama")
def test_a_forked_beam_copies_its_block_on_first_write():
    runner = random_runner()
    engine = make_engine(runner)
    [request] = searches([2 * BLOCK + 2], eos=())
    engine.add(request)
    engine.step()
    engine.pipeline.commit()
    rows = [s.row for s in request.sequences]
    assert len(rows) == WIDTH and int(engine.manager.pool.num_held) == 3, "all tables refer to the prompt's blocks"
    plan = engine.scheduler.schedule()
    assert len(plan.copies[0]) == WIDTH - 1, "the last holder to write keeps the block"
    assert len(set(engine.manager.tables.blocks[0, rows, 2].tolist())) == WIDTH


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("llama", HYBRID)]
)
@pytest.mark.parametrize("host", [dict(), dict(block_sharing=False), dict(budget=5)], ids=str)
def test_contiguous_is_paged(name, host):
    """In a contiguous cache beams copy all that they have in common."""
    assert search(make_engine(contiguous(name), **host), searches()) == search(make_engine(runner_of(name)), searches())


@pytest.mark.slow
@pytest.mark.xdist_group("beams two")
def test_sharded_is_single(tmp_path):
    folder = checkpoint.write(tmp_path, CONFIG | HYBRIDS["alternating"], with_tokenizer=False)

    def results(tp: int) -> list[Found]:
        mesh = make_mesh(tp)
        program, params = split(weights.load(folder, mesh, progress=False), mesh)
        return search(make_engine(Runner(program, params, shapes_of(program))), searches())

    one, two = results(1), results(2)
    assert [[tokens for tokens, _ in result] for result in two] == [[tokens for tokens, _ in result] for result in one]
    assert ROWS >= 2 * WIDTH
