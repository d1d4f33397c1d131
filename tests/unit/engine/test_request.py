"""A sequence: finish reasons, forbidden tokens and required sampler level."""

import numpy as np
import pytest
from support.tiny import make_request, prompt

from jaxinfer.engine.request import Status, bias_row, depends_on_history
from jaxinfer.engine.runner.row_params import RowParams
from jaxinfer.engine.sampling.sampling_rows import EDITED, Level
from jaxinfer.inputs.defaults import ModelLimits, resolve
from jaxinfer.sampling_params import SamplingParams

V = 97


def request(eos=(), length=4, **fields):
    """A request for a model with EOS ids `eos`."""
    params = resolve(SamplingParams(**fields), ModelLimits(V, 128, eos), prompt_len=length)
    made = make_request("x", prompt(length), SamplingParams(max_tokens=params.max_tokens, n=params.n))
    made.params, made.stop_ids = params, params.all_stop_token_ids
    return made


def add(sequence, *tokens):
    sequence.prepare()  # as done when it gets a row
    return [sequence.add(token) for token in tokens]


def test_a_sequence_ends_at_its_length():
    [sequence] = request(max_tokens=3).sequences
    assert add(sequence, 5, 6, 7) == [None, None, "length"]
    assert (sequence.made, sequence.stop_reason) == (3, None)


def test_eos_and_stop_ids():
    fields = dict(eos=(5, 6), stop_token_ids=[8], max_tokens=4)
    for token, reason in ((5, None), (6, None), (8, 8)):
        [sequence] = request(**fields).sequences
        assert add(sequence, 9, token) == [None, "stop"]
        assert sequence.stop_reason == reason
    [sequence] = request(**fields, ignore_eos=True).sequences
    assert add(sequence, 5, 6, 9, 8) == [None, None, None, "stop"]


def test_min_tokens_come_first():
    [sequence] = request(eos=(5,), min_tokens=2, max_tokens=5).sequences
    assert add(sequence, 5, 5, 5) == [None, None, "stop"]


def test_a_stop_on_the_last_token_is_a_stop():
    [sequence] = request(eos=(5,), max_tokens=2).sequences
    assert add(sequence, 9, 5) == [None, "stop"]


def test_a_listener_may_end_it():
    class Stops:
        def on_token(self, sequence, ending):
            return "END" if sequence.made == 2 else None

    made = request(max_tokens=5)
    made.listener = Stops()
    [sequence] = made.sequences
    assert add(sequence, 9, 9) == [None, "stop"]
    assert sequence.stop_reason == "END"


def test_a_request_has_finished_when_all_its_samples_have():
    made = request(n=3, max_tokens=2)
    for sequence in made.sequences:
        assert not made.finished
        sequence.status = Status.FINISHED
    assert made.finished
    assert len({tuple(s.key) for s in made.sequences}) == 3, "each sample has its own key"
    assert [s.age for s in made.sequences] == sorted(s.age for s in made.sequences)


@pytest.mark.parametrize(
    ("fields", "level"),
    [
        (dict(temperature=0), Level.GREEDY),
        (dict(temperature=0, top_k=5, top_p=0.5), Level.GREEDY),
        (dict(), Level.RANDOM),
        (dict(min_p=0.1), Level.RANDOM),
        (dict(top_k=5), Level.TRUNCATED),
        (dict(top_p=0.5), Level.TRUNCATED),
        (dict(temperature=0, repetition_penalty=1.1), Level.EDITED),
        (dict(presence_penalty=0.1), Level.EDITED),
        (dict(frequency_penalty=0.1), Level.EDITED),
        (dict(logit_bias={3: 1}), Level.EDITED),
        (dict(allowed_token_ids=[3]), Level.EDITED),
        (dict(_bad_words_token_ids=((3,),)), Level.EDITED),
        (dict(eos=(5,), min_tokens=1), Level.RANDOM),  # except where it is too early to end
        (dict(_bad_words_token_ids=((3, 4),)), Level.RANDOM),  # except after a 3
        (dict(_bad_words_ids=((3,),)), Level.EDITED),
        (dict(min_tokens=1), Level.RANDOM),
    ],
)
def test_the_least_level_that_serves(fields, level):
    assert request(**fields).level is level


def bias(sequence):
    sequence.bias_version = -1
    return bias_row(sequence, sequence.length, V)[1]


def test_biases_and_masks():
    allowed = dict(allowed_token_ids=[3, 4, 9], _bad_words_token_ids=((9,),))
    [sequence] = request(logit_bias={3: 1.5, 4: -2}, **allowed).sequences
    row = bias(sequence)
    assert (row[3], row[4], row[9], row[10]) == (1.5, -2, -np.inf, -np.inf)
    assert np.isfinite(row).sum() == 2


def test_min_tokens_mask_what_would_end_it():
    [sequence] = request(eos=(5,), stop_token_ids=[8], min_tokens=2, max_tokens=9).sequences
    versions = []
    for _ in range(4):
        version, row = bias_row(sequence, sequence.length, V)
        versions.append(version)
        if len(row):
            masked = set(np.flatnonzero(np.isinf(row)).tolist())
            assert masked == ({5, 8} if sequence.made < 2 else set())
        sequence.bias_version = version
        add(sequence, 9)
    assert versions == [(5, 8), (5, 8), (), ()], "the bias row is only rebuilt when it changes"


def test_bad_words_of_several_tokens_mask_their_last():
    [sequence] = request(_bad_words_token_ids=((11, 12, 13), (12, 14), (15,)), max_tokens=9).sequences
    masked = []
    for token in (11, 12, 13, 12, 11, 12):
        masked.append(sorted(np.flatnonzero(np.isinf(bias(sequence))).tolist()))
        add(sequence, token)
    masked.append(sorted(np.flatnonzero(np.isinf(bias(sequence))).tolist()))
    assert masked == [[15], [15], [13, 14, 15], [15], [14, 15], [15], [13, 14, 15]]
    assert depends_on_history(sequence.request)
    assert not depends_on_history(request(_bad_words_token_ids=((15,),)))


def test_a_bad_word_is_looked_for_in_the_output_alone():
    """As in vLLM; transformers' `bad_words_ids` also match in the prompt, if it is long enough."""
    last, words = prompt(4)[-1], lambda name, *words: request(**{name: words}, max_tokens=3).sequences[0]
    assert np.isfinite(bias(words("_bad_words_token_ids", (last, 50)))).all()
    found = bias(words("_bad_words_ids", (last, 50), (9, *prompt(4), 51), (*prompt(4), 52)))
    assert np.flatnonzero(np.isinf(found)).tolist() == [50, 52]


def test_a_row_takes_the_highest_level_only_while_tokens_are_forbidden():
    params_by_row, made = (
        RowParams(4),
        request(eos=(5,), min_tokens=2, _bad_words_token_ids=((11, 12),), max_tokens=9, temperature=0),
    )
    [sequence], levels = made.sequences, []
    sequence.row = 2
    params_by_row.write([sequence])
    for token in (9, 9, 9, 11, 9):
        params_by_row.update_levels([sequence], np.array([sequence.length]))
        levels.append(params_by_row.needs(np.array([0, 2])).level)
        assert params_by_row.packed[2, EDITED] == (levels[-1] == Level.EDITED)
        add(sequence, token)
    assert levels == [Level.EDITED, Level.EDITED, Level.GREEDY, Level.GREEDY, Level.EDITED]


def test_failures_are_counted_in_a_row():
    [sequence] = request(max_tokens=20).sequences
    assert sequence.count_failure() == 1
    add(sequence, 9)
    assert sequence.count_failure() == 2, "a single token comes from the prefill and is not a success"
    add(sequence, 9, 9)
    assert sequence.count_failure() == 1
    assert sequence.count_failure() == 2


def test_a_queued_sequence_holds_its_prompt_and_a_finished_one_its_tokens():
    made = request(max_tokens=100, n=2)
    first, second = made.sequences
    assert first.tokens is second.tokens is made.prompt, "no room is allocated for max_tokens yet"
    add(first, 5, 6)
    assert len(first.tokens) == 104 and len(second.tokens) == len(made.prompt) == 4
    second.adopt(first)
    second.add(7)
    assert first.output_ids.tolist() == [5, 6] and second.output_ids.tolist() == [5, 6, 7]
    first.trim()
    assert len(first.tokens) == 6 and first.output_ids.tolist() == [5, 6]
