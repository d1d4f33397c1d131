"""A sequence: finish reasons, failures and memory."""

from support.tiny import add_tokens, resolved_request

from jaxinfer.engine.sequence_state import Status


def test_a_sequence_ends_at_its_length():
    [sequence] = resolved_request(max_tokens=3).sequences
    assert add_tokens(sequence, 5, 6, 7) == [None, None, "length"]
    assert (sequence.made, sequence.stop_reason) == (3, None)


def test_eos_and_stop_ids():
    fields = dict(eos=(5, 6), stop_token_ids=[8], max_tokens=4)
    for token, reason in ((5, None), (6, None), (8, 8)):
        [sequence] = resolved_request(**fields).sequences
        assert add_tokens(sequence, 9, token) == [None, "stop"]
        assert sequence.stop_reason == reason
    [sequence] = resolved_request(**fields, ignore_eos=True).sequences
    assert add_tokens(sequence, 5, 6, 9, 8) == [None, None, None, "stop"]


def test_min_tokens_come_first():
    [sequence] = resolved_request(eos=(5,), min_tokens=2, max_tokens=5).sequences
    assert add_tokens(sequence, 5, 5, 5) == [None, None, "stop"]


def test_a_stop_on_the_last_token_is_a_stop():
    [sequence] = resolved_request(eos=(5,), max_tokens=2).sequences
    assert add_tokens(sequence, 9, 5) == [None, "stop"]


def test_a_request_has_finished_when_all_its_samples_have():
    made = resolved_request(n=3, max_tokens=2)
    for sequence in made.sequences:
        assert not made.finished
        sequence.status = Status.FINISHED
    assert made.finished
    assert len({tuple(s.key) for s in made.sequences}) == 3, "each sample has its own key"
    assert [s.age for s in made.sequences] == sorted(s.age for s in made.sequences)


def test_failures_are_counted_in_a_row():
    [sequence] = resolved_request(max_tokens=20).sequences
    assert sequence.count_failure() == 1
    add_tokens(sequence, 9)
    assert sequence.count_failure() == 2, "a single token comes from the prefill and is not a success"
    add_tokens(sequence, 9, 9)
    assert sequence.count_failure() == 1
    assert sequence.count_failure() == 2


def test_a_queued_sequence_holds_its_prompt_and_a_finished_one_its_tokens():
    made = resolved_request(max_tokens=100, n=2)
    first, second = made.sequences
    assert first.tokens is second.tokens is made.prompt, "no room is allocated for max_tokens yet"
    add_tokens(first, 5, 6)
    assert len(first.tokens) == 104 and len(second.tokens) == len(made.prompt) == 4
    second.adopt(first)
    second.add(7)
    assert first.output_ids.tolist() == [5, 6] and second.output_ids.tolist() == [5, 6, 7]
    first.trim()
    assert len(first.tokens) == 6 and first.output_ids.tolist() == [5, 6]
