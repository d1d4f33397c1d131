"""Prompt lookup, and when a sequence gets a draft."""

import argparse

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import make_request

from jaxinfer.engine.speculation.drafter import LONGEST_WAIT, PAUSE, TRIAL, WINDOW, Drafter, Payoff
from jaxinfer.engine.speculation.prompt_lookup import find_draft
from jaxinfer.errors import ConfigError
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.serve import cli
from jaxinfer.speculative_config import SpeculativeConfig

NONE: list[int] = []


@pytest.mark.parametrize(
    ("tokens", "count", "draft"),
    [
        ([1, 2, 3, 4, 1, 2], 3, [3, 4, 1]),
        ([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], 2, [4, 9]),  # the last of two places
        ([7, 1, 2, 3, 5, 1, 2, 4, 7, 1, 2], 2, [3, 5]),  # three equal tokens before two
        ([1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),  # repeats what reaches the end
        ([5, 5, 5], 4, [5, 5, 5, 5]),
        ([1, 2, 3], 3, NONE),
        ([4, 2, 3, 2], 3, NONE),  # one equal token is too few
        ([1], 3, NONE),
        ([1, 2, 1, 2], 0, NONE),
    ],
)
def test_drafts(tokens, count, draft):
    found = find_draft(np.array(tokens, np.int32), count, 4, 2)
    assert found.tolist() == draft and found.dtype == np.int32


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 4))
def test_a_draft_is_what_followed_the_longest_equal_end(tokens, longest, shortest):
    shortest, length = min(longest, shortest), len(tokens)
    best = None
    for size in range(shortest, longest + 1):
        for end in range(size - 1, length - 1):
            if tokens[end - size + 1 : end + 1] == tokens[length - size :]:
                best = end
    copied = list(tokens)
    for _ in range(6 if best is not None else 0):
        copied.append(copied[best + 1 + len(copied) - length])
    assert find_draft(np.array(tokens, np.int32), 6, longest, shortest).tolist() == copied[length:]


def sequence(length=8, **params):
    params = {"temperature": 0, "max_tokens": 40} | params
    return make_request("a", [1, 2, 3, 4] * (length // 4), SamplingParams(**params)).sequences[0]


def drafter(most=16, lacks=lambda *_: False, **fields):
    return Drafter(SpeculativeConfig(**fields), most, lacks)


def propose(one, *sequences, remaining=40):
    rows = np.arange(len(sequences))
    found = one.propose(sequences, rows, np.full(len(rows), remaining))
    return found if found is None else [draft.tolist() for draft in found]


def test_drafts_grow_while_they_are_right_and_shrink_to_one_more_than_was():
    one, own = drafter(num_speculative_tokens=9), sequence()
    assert propose(one, own) == [[1, 2, 3]]
    one.note(own, 3, 3)
    assert propose(one, own) == [[1, 2, 3, 4, 1, 2]]
    one.note(own, 6, 6)
    assert [len(draft) for draft in propose(one, own)] == [9], "num_speculative_tokens"
    one.note(own, 9, 1)
    assert propose(one, own) == [[1, 2]]


def test_a_wrong_draft_makes_the_sequence_wait_longer_each_time():
    one, own, waits = drafter(), sequence(), []
    for _ in range(9):
        one.note(own, 2, 0)
        waits.append(own.draft_from - own.length - 1)
        assert propose(one, own) is None and not one.may_draft([own])
    assert waits == [1, 2, 4, 8, 16, 32, 64, LONGEST_WAIT, LONGEST_WAIT]
    one.note(own, 2, 1)
    one.note(own, 2, 0)
    assert own.draft_from == own.length + 2


def test_look_ups_that_find_nothing_become_rare_until_one_finds_something():
    one, own, waits = drafter(), sequence(), []
    own.tokens = np.arange(100, 200, dtype=np.int32)
    for _ in range(5):
        assert propose(one, own) is None
        waits.append(own.draft_from - own.length)
        own.length = own.draft_from - 1
        assert not one.may_draft([own]), "steps may be dispatched ahead meanwhile"
        own.length += 1
    assert waits == [1, 2, 4, 8, 8]
    own.tokens[own.length - 2 : own.length] = own.tokens[:2]
    assert propose(one, own) == [[102, 103, 104]] and own.empty_lookups == 0


def test_the_time_of_a_step_with_a_prefill_is_no_measure():
    one, own = drafter(), sequence()
    for _ in range(WINDOW):
        one.note(own, 2, 1)
        one.note_step(None)
        one.note_step(1.0)
    assert one.payoff._verified == [] and one.payoff._decode == 1.0


def test_a_draft_leaves_room_for_the_sample_after_it_and_for_other_rows():
    assert propose(drafter(), sequence(), remaining=3) == [[1, 2]]
    assert propose(drafter(), sequence(), remaining=1) is None
    assert propose(drafter(most=6), sequence(), sequence()) == [[1, 2, 3], [1]]
    assert propose(drafter(most=2), sequence(), sequence()) is None
    assert propose(drafter(most=1), sequence(), sequence()) is None


@pytest.mark.parametrize(
    "params",
    [{"repetition_penalty": 1.1}, {"logit_bias": {3: 1.0}}, {"min_tokens": 3, "stop_token_ids": [5]}],
    ids=["penalty", "bias", "minimum"],
)
def test_samples_that_depend_on_all_tokens_before_get_no_draft(params):
    other = sequence(**params)
    assert propose(drafter(), other) is None
    assert propose(drafter(), sequence(), other) == [[1, 2, 3], []]


def test_no_draft_while_tokens_are_unread_or_the_program_is_missing():
    own, asked = sequence(), []
    own.pending = 1
    assert propose(drafter(), own) is None
    own.pending = 0
    one = drafter(lacks=lambda sequences, rows, tokens: asked.append(tokens) is None)
    assert propose(one, own) is None and asked == [4]


def test_tokens_are_not_read_first_where_a_step_has_no_room_for_drafts():
    one = drafter(most=2)
    assert one.may_draft([sequence()]) and not one.may_draft([sequence(), sequence()])


def test_drafts_pause_while_they_make_fewer_tokens_a_second():
    payoff = Payoff()
    payoff.note_decode(1.0)
    for _ in range(WINDOW):
        payoff.note_verify(1.9, 2.0)
    assert not payoff.pause, "two tokens in 1.9 s"
    for seconds in [100.0, *[1.9] * (WINDOW - 1)]:
        payoff.note_verify(seconds, 2.0)
    assert not payoff.pause, "one slow step is no measure"
    for _ in range(WINDOW):
        payoff.note_verify(2.1, 2.0)
    assert payoff.pause == PAUSE
    payoff.pause = 0
    for spent in [10.0, *[0.0] * (WINDOW - 1)]:
        payoff.note_verify(1.9 + spent / 10, 2.0, spent)
    assert payoff.pause, "what drafting took counts, even before the slowest step"
    payoff.pause = PAUSE
    one, own = drafter(), sequence()
    one.payoff = payoff
    assert propose(one, own) is None
    for _ in range(PAUSE):
        one.note_step(1.0)
    assert propose(one, own) == [[1, 2, 3]]


def test_drafts_pause_to_measure_decode_steps_where_none_ran_before():
    payoff = Payoff()
    for _ in range(WINDOW):
        payoff.note_verify(2.1, 2.0)
    assert payoff.pause == TRIAL
    payoff.note_decode(50.0)
    for _ in range(TRIAL - 1):
        payoff.note_decode(1.0)
    assert not payoff.pause
    for _ in range(WINDOW):
        payoff.note_verify(2.1, 2.0)
    assert payoff.pause == PAUSE


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ngram", "must be a dictionary such as"),
        ({"method": "eagle"}, "method must be ngram or draft_model, got 'eagle'"),
        ({"num_speculative_tokens": 0}, r"num_speculative_tokens must be an integer in \[1, 32\], got 0"),
        ({"prompt_lookup_min": True}, "got True"),
        ({"prompt_lookup_min": 5}, "prompt_lookup_min is 5, more than prompt_lookup_max = 4; lower it"),
        ({"draft": "DIR"}, "has no 'draft'; known: method, model, num_speculative_tokens"),
        ({"model": "DIR"}, "model is 'DIR', and method 'ngram' has none; pass 'method': 'draft_model'"),
        ({"method": "draft_model"}, "method 'draft_model' needs a model, .* got None"),
        ({"method": "draft_model", "model": ""}, "needs a model"),
        ({"method": "draft_model", "model": "DIR", "prompt_lookup_max": 5}, "prompt_lookup_max is for method 'ngram'"),
    ],
)
def test_wrong_settings_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        SpeculativeConfig.of(given)


def test_the_servers_option_takes_the_same_fields(capsys):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    args = parser.parse_args(["DIR", "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}'])
    assert args.speculative_config == SpeculativeConfig(num_speculative_tokens=3)
    for text, message in (("{", "is not JSON"), ('{"method": "eagle"}', "--speculative-config: method must be ngram")):
        with pytest.raises(SystemExit):
            parser.parse_args(["DIR", "--speculative-config", text])
        assert message in capsys.readouterr().err
