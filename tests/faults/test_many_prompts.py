"""Calls of many prompts: what the host does for one of them does not grow with their number."""

import sys

import pytest

from jaxinfer import SamplingParams
from jaxinfer.inputs.tokenizer import encode_batch, encodes_batches
from jaxinfer.results.output_processor import Handle
from jaxinfer.sampling_params import RequestOutputKind

pytestmark = pytest.mark.xdist_group("faults")
ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


def calls(llm, run, count):
    """Calls of functions for each of `count` prompts, on the caller's thread and on the engine's."""
    made = [0]

    def note(_frame, event, _argument):
        made[0] += event in ("call", "c_call")

    before = sys.getprofile()
    llm._thread.run(sys.setprofile, note)
    sys.setprofile(note)
    try:
        results = run([[10 + i % 50, 7, 8] for i in range(count)])
    finally:
        sys.setprofile(before)
        llm._thread.run(sys.setprofile, None)
    assert len(results) == count
    return made[0] / count


@pytest.mark.parametrize("run", ["generate", "stream"])
def test_the_work_for_a_prompt_is_the_same_in_a_long_call(llm, host, run):
    with host(check_invariants=False):

        def call(prompts):
            return list(getattr(llm, run)(prompts, ONE))

        calls(llm, call, 16)
        few = calls(llm, call, 80)
        # A caller that waits for long on a busy machine looks more often whether the engine's thread is alive.
        assert any(calls(llm, call, 400) < 1.2 * few for _ in range(3))


def test_only_what_is_new_of_a_stream_is_looked_at(llm, monkeypatch):
    looked, update = [], Handle.update
    monkeypatch.setattr(Handle, "update", lambda self, kind: looked.append(self) or update(self, kind))
    for kind in (RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE):
        looked.clear()
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, output_kind=kind)
        updates = list(llm.stream([[9, i] for i in range(40)], params))
        assert len(looked) == len(updates) <= 40 * 4
        ends = [int(update.request_id) for update in updates if update.finished]
        assert len(ends) == 40 and ends == sorted(ends), "first come, first served"


def test_texts_of_a_call_are_encoded_together(llm, monkeypatch):
    tokenizer, texts = llm.get_tokenizer(), ["one two", "", "three\n\n four", "five 🙂 ünï", " six", "a" * 99]
    assert encodes_batches(tokenizer)
    for special in (False, True):
        assert encode_batch(tokenizer, texts, special) == [
            tokenizer.encode(t, add_special_tokens=special) for t in texts
        ]
    alone = [
        llm._input_processor.requests(llm._input_processor.parse(text), ONE)[0].prompt.tolist()
        for text in texts
        if text
    ]
    mixed = ["one two", {"prompt_token_ids": [4, 5]}, *texts[2:]]
    monkeypatch.setattr(type(llm._input_processor), "_encode", None)
    requests = llm._input_processor.requests(llm._input_processor.parse(mixed), ONE)
    assert [r.prompt.tolist() for r in requests] == [alone[0], [4, 5], *alone[1:]]
    assert len({id(r.params) for r in requests}) == 1, "resolved once"

    class Own(type(tokenizer)):
        def encode(self, text, **_):
            return [1]

    assert not encodes_batches(Own) and not encodes_batches(Own.__new__(Own))
