"""What a request's parameters ask of the sampler: its level, biases and forbidden tokens."""

import numpy as np
import pytest
from support.tiny import VOCAB, add_tokens, prompt, resolved_request

from jaxinfer.engine.runner.row_params import RowParams
from jaxinfer.engine.sampling.parameters import bias_row, depends_on_history, sampler_level
from jaxinfer.engine.sampling.sampling_rows import EDITED, Level


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
    assert sampler_level(resolved_request(**fields)) is level


def bias(sequence):
    sequence.bias_version = -1
    return bias_row(sequence, sequence.length, VOCAB)[1]


def test_biases_and_masks():
    allowed = dict(allowed_token_ids=[3, 4, 9], _bad_words_token_ids=((9,),))
    [sequence] = resolved_request(logit_bias={3: 1.5, 4: -2}, **allowed).sequences
    row = bias(sequence)
    assert (row[3], row[4], row[9], row[10]) == (1.5, -2, -np.inf, -np.inf)
    assert np.isfinite(row).sum() == 2


def test_min_tokens_mask_what_would_end_it():
    [sequence] = resolved_request(eos=(5,), stop_token_ids=[8], min_tokens=2, max_tokens=9).sequences
    versions = []
    for _ in range(4):
        version, row = bias_row(sequence, sequence.length, VOCAB)
        versions.append(version)
        if len(row):
            masked = set(np.flatnonzero(np.isinf(row)).tolist())
            assert masked == ({5, 8} if sequence.made < 2 else set())
        sequence.bias_version = version
        add_tokens(sequence, 9)
    assert versions == [(5, 8), (5, 8), (), ()], "the bias row is only rebuilt when it changes"


def test_bad_words_of_several_tokens_mask_their_last():
    [sequence] = resolved_request(_bad_words_token_ids=((11, 12, 13), (12, 14), (15,)), max_tokens=9).sequences
    masked = []
    for token in (11, 12, 13, 12, 11, 12):
        masked.append(sorted(np.flatnonzero(np.isinf(bias(sequence))).tolist()))
        add_tokens(sequence, token)
    masked.append(sorted(np.flatnonzero(np.isinf(bias(sequence))).tolist()))
    assert masked == [[15], [15], [13, 14, 15], [15], [14, 15], [15], [13, 14, 15]]
    assert depends_on_history(sequence.request)
    assert not depends_on_history(resolved_request(_bad_words_token_ids=((15,),)))


def test_a_bad_word_is_looked_for_in_the_output_alone():
    """As in vLLM; transformers' `bad_words_ids` also match in the prompt, if it is long enough."""
    last, words = prompt(4)[-1], lambda name, *words: resolved_request(**{name: words}, max_tokens=3).sequences[0]
    assert np.isfinite(bias(words("_bad_words_token_ids", (last, 50)))).all()
    found = bias(words("_bad_words_ids", (last, 50), (9, *prompt(4), 51), (*prompt(4), 52)))
    assert np.flatnonzero(np.isinf(found)).tolist() == [50, 52]


def test_a_row_takes_the_highest_level_only_while_tokens_are_forbidden():
    params_by_row, made = (
        RowParams(4),
        resolved_request(eos=(5,), min_tokens=2, _bad_words_token_ids=((11, 12),), max_tokens=9, temperature=0),
    )
    [sequence], levels = made.sequences, []
    sequence.row = 2
    params_by_row.write([sequence])
    for token in (9, 9, 9, 11, 9):
        params_by_row.update_levels([sequence], np.array([sequence.length]))
        levels.append(params_by_row.needs(np.array([0, 2])).level)
        assert params_by_row.packed[2, EDITED] == (levels[-1] == Level.EDITED)
        add_tokens(sequence, token)
    assert levels == [Level.EDITED, Level.EDITED, Level.GREEDY, Level.GREEDY, Level.EDITED]
