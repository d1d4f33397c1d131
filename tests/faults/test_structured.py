"""Structured output: every finished output has its structure, whatever else runs; what cannot be is refused or ends."""

import json
import re
import sys
import threading
import time

import pytest
from support.compiling import Gate, is_prefill
from support.stepping import Held, wait_until

from jaxinfer import SamplingParams, StructuredOutputsParams
from jaxinfer.engine.structured import grammar
from jaxinfer.inputs.grammars import Grammars

pytest.importorskip("llguidance")
pytestmark = pytest.mark.xdist_group("faults")

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "né"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
PROMPTS = ["hello world", [5, 6, 7], "the cat sat on the mat", "hello"]
FREE = SamplingParams(temperature=0.9, seed=4, max_tokens=24, ignore_eos=True)


def drawn(structure, **fields):
    """Sampled output with a structure."""
    return SamplingParams(**dict(temperature=0.9, seed=4, max_tokens=60, structured_outputs=structure) | fields)


MIXED = [
    drawn({"json": SCHEMA}, n=2),
    FREE,
    drawn({"regex": "[0-9]{3}-[a-f]{2,9}z"}, logprobs=2),
    drawn({"grammar": 'start: "(" inner* ")"\ninner: "a" | start'}, max_tokens=12),
]


def outputs(results):
    return [(o.text, list(o.token_ids), o.finish_reason, o.stop_reason) for r in results for o in r.outputs]


@pytest.fixture(scope="module")
def expected(shared_llm):
    """What each request of `MIXED` gives alone."""
    return [outputs(shared_llm.generate(*pair)) for pair in zip(PROMPTS, MIXED, strict=True)]


def test_outputs_have_their_structure(expected):
    for text, _, reason, stop in expected[0]:
        values = json.loads(text)
        assert set(values) == {"a", "b"} and 0 <= values["a"] <= 99 and values["b"] in ("x", "né")
        assert (reason, stop) == ("stop", None)
    assert len({text for text, *_ in expected[0]}) == 2, "each sample has a state of its own"
    [(text, _, reason, _)] = expected[2]
    assert re.fullmatch("[0-9]{3}-[a-f]{2,9}z", text) and reason == "stop"
    [(text, ids, reason, _)] = expected[3]
    assert re.fullmatch(r"[a()]+", text) and (reason == "stop") == (text.count("(") == text.count(")"))
    assert reason == "stop" or len(ids) == 12


def test_a_batch_equals_each_alone(llm, expected):
    """Beside rows without structure, and in the order that a batch has."""
    assert outputs(llm.generate(PROMPTS, MIXED)) == [one for each in expected for one in each]


def test_preempted_and_prefixes_found(llm, host, expected):
    with host(pool_blocks=24) as engine:
        results = llm.generate(PROMPTS * 2, MIXED * 2)
        assert outputs(results) == [one for each in expected for one in each] * 2
        assert engine.scheduler.preempted > 0
    results = llm.generate([PROMPTS[2]] * 2, MIXED[2])
    again = llm.generate(PROMPTS[2], MIXED[2])
    assert again[0].num_cached_tokens > 0 and outputs(again) == outputs(results)[:1] == expected[2]


def test_prefills_that_wait_for_their_programs(llm, expected, monkeypatch):
    """A structured request decodes meanwhile."""
    found, taken_back, engine = {}, [], llm._engine
    gate = Gate(engine.runner.programs, lambda key: armed and is_prefill(key))
    armed, postpone = False, engine.scheduler.postpone
    monkeypatch.setattr(engine.runner, "programs", gate)
    monkeypatch.setattr(engine.scheduler, "postpone", lambda *given: taken_back.append(1) or postpone(*given))

    def call(some):
        thread = threading.Thread(target=lambda: found.update({some.start: llm.generate(PROMPTS[some], MIXED[some])}))
        thread.start()
        return thread

    with Held(engine, lambda: any(s.made > 1 for r in engine.requests.values() for s in r.sequences)) as steps:
        first = call(slice(1))
        steps.wait(first.is_alive)
        armed = True
        others = call(slice(1, None))
        wait_until(lambda: len(engine.requests) == len(PROMPTS), others.is_alive)
    wait_until(lambda: gate.release() or not (first.is_alive() or others.is_alive()))
    assert taken_back
    assert outputs(found[None]) + outputs(found[1]) == [one for each in expected for one in each]


def test_a_failed_step_is_computed_again(llm, expected, monkeypatch):
    runner, failures = llm._engine.runner, []
    sample = runner.sample_pending

    def fail_once(flight):
        if flight.pending is not None and not failures:
            failures.append(flight)
            raise RuntimeError("between the logits and the tokens")
        sample(flight)

    monkeypatch.setattr(runner, "sample_pending", fail_once)
    assert outputs(llm.generate(PROMPTS, MIXED)) == [one for each in expected for one in each]
    assert failures


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_mask_is_that_of_allowed_token_ids(llm, temperature):
    """The same random numbers, another mechanism."""
    tokenizer = llm.get_tokenizer()
    letters = [i for i in range(3, len(tokenizer)) if re.fullmatch("[a-z]+", tokenizer.decode([i]))]
    params = SamplingParams(temperature=temperature, seed=7, max_tokens=12, ignore_eos=True)
    fields = dict(temperature=temperature, seed=7, max_tokens=12)
    masked = SamplingParams(**fields, ignore_eos=True, structured_outputs={"regex": "[a-z]*"})
    allowed = SamplingParams(**fields, ignore_eos=True, allowed_token_ids=letters)
    free, one, other = (outputs(llm.generate("hello", p)) for p in (params, masked, allowed))
    assert one == other != free


def test_where_an_output_ends(llm):
    """The end token only where the structure allows it, and the end without one where nothing may follow."""
    eager = dict.fromkeys(llm._opened.eos_token_ids, 100.0)

    def made(regex, **fields):
        fields = dict(temperature=0, max_tokens=20, structured_outputs={"regex": regex}) | fields
        [output] = llm.generate("hello", SamplingParams(**fields))[0].outputs
        return output.text, output.finish_reason, output.token_ids[-1] in llm._opened.eos_token_ids

    assert made("abcde") == ("abcde", "stop", False)
    assert made("a{3,}", logit_bias=eager) == ("aaa", "stop", True)
    assert made("a{3,}", logit_bias=eager, min_tokens=9) == ("a" * 9, "stop", True)
    assert made("aaa", min_tokens=9) == ("aaa", "stop", False), "a complete structure ends before min_tokens"
    assert made("a+", ignore_eos=True) == ("a" * 20, "length", False)
    assert made("aaa", ignore_eos=True) == ("aaa", "stop", False)
    assert made("a{30}") == ("a" * 20, "length", False)
    assert made("[ab]{6}", bad_words=["a"]) == ("bbbbbb", "stop", False)
    assert made("abcdef", stop=["cd"]) == ("ab", "stop", False)
    [a] = llm.get_tokenizer().encode("a", add_special_tokens=False)
    assert made("a*", stop_token_ids=[9], logit_bias={9: 100.0}, ignore_eos=True, allowed_token_ids=[9, a])[1] == "stop"
    assert made("a{2,4}", allowed_token_ids=[a]) == ("aaaa", "stop", False)
    assert made("a{2}b?", allowed_token_ids=[a]) == ("aa", "stop", False), "only the end is left, and it is masked"


def test_other_masks_may_leave_nothing(llm):
    [output], [beside] = (
        r.outputs
        for r in llm.generate(
            ["hello", "hello"], [drawn({"regex": "[bc]+a{3}"}, bad_words=["a", "b", "c", "bc", "cb"]), FREE]
        )
    )
    assert output.finish_reason == "error" and "structured_outputs: no token is left" in output.stop_reason
    assert beside.finish_reason == "length"


@pytest.mark.parametrize(
    "structure, message",
    [
        ({"json": {"type": "foo"}}, r"\['json'\] cannot be used: Invalid type: foo"),
        ({"json": {"type": "array", "uniqueItems": True}}, "Unimplemented keys.*uniqueItems"),
        ({"json": '{"type":'}, r"\['json'\] cannot be used: EOF"),
        ({"json": '{"items":' * 5000 + "{}" + "}" * 5000}, "recursion limit"),
        ({"json": {"$ref": "http://example.com/x"}}, "not present"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 1}}, "cannot be used"),
        ({"regex": "("}, r"\['regex'\] cannot be used: .*unclosed group"),
        ({"regex": r"[^\s\S]"}, "no text satisfies it"),
        ({"regex": "(" * 5000 + "a" + ")" * 5000}, r"\['regex'\] cannot be used"),
        ({"grammar": 'start: "a" other'}, r"\['grammar'\] cannot be used: .*unknown name"),
        ({"grammar": "start: a\na: a"}, "no text satisfies it"),
        (
            {
                "json": {
                    "$defs": {f"{i}": {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(2400)},
                    "$ref": "#/$defs/0",
                }
            },
            "does not exist",
        ),
        ({"grammar": "root ::= " + "(" * 9000}, r"\['grammar'\] cannot be used"),
        ({"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(200))}, "unknown name"),
    ],
)
def test_what_cannot_be_is_refused(llm, structure, message):
    """Before anything of the call is queued, and without the process' stack overflowing."""
    with pytest.raises(ValueError, match=f"structured_outputs.*{message}"):
        llm.generate(["hello", "hello"], [FREE, drawn(structure)])


def test_beams_are_refused_by_name(llm):
    with pytest.raises(ValueError, match="structured_outputs does not apply to beam search"):
        llm.beam_search("hello", width=2, sampling_params=SamplingParams(structured_outputs={"regex": "a"}))


def test_a_catastrophic_structure_is_bounded(llm, expected):
    """It ends alone, within limits of time and memory."""
    bad = [{"regex": "(a?){500}a{500}"}, {"regex": "a{100000}"}, {"regex": "(a{1,1000}){1,1000}"}]
    started = time.monotonic()
    results = llm.generate(["hello"] * 3 + PROMPTS, [drawn(one, max_tokens=40) for one in bad] + MIXED)
    assert time.monotonic() - started < 300
    assert outputs(results[3:]) == [one for each in expected for one in each]
    failed = [o for r in results[:3] for o in r.outputs if o.finish_reason == "error"]
    assert failed and all("structured_outputs: the output cannot be continued" in o.stop_reason for o in failed)


def test_what_others_left_in_the_lexer_harms_nobody(llm, monkeypatch):
    """Sequences with one structure share its states, of which there may only be so many."""
    structure = {"regex": "([a-m]{2,9}|[n-z]{3,8}){1,4}-[a-z]{1,30}!"}
    cache, seeds = llm._input_processor._grammars._made, range(6)

    def made(seed):
        return outputs(llm.generate("hello", drawn(structure, seed=seed)))

    for most in range(40, 400, 20):  # as few states as a sequence alone can do with
        monkeypatch.setitem(grammar.LIMITS, "max_lexer_states", most)
        one = [(cache.clear(), made(seed))[1] for seed in seeds]
        if all(reason != "error" for [(_, _, reason, _)] in one):
            break
    cache.clear()
    assert [made(seed) for seed in seeds] == one
    assert cache[StructuredOutputsParams(**structure)].result().generation > 0, "the limit was reached"
    cache.clear()


def test_without_the_library(llm, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    grammars = Grammars(llm.get_tokenizer(), 320, (1,))
    with pytest.raises(ValueError, match=r"needs the package llguidance: pip install 'jaxinfer\[structured\]'"):
        grammars.get(StructuredOutputsParams(regex="a"))


def test_without_a_tokenizer():
    with pytest.raises(ValueError, match="structured_outputs needs the tokenizer, which was skipped"):
        Grammars(None, 320, (1,)).get(StructuredOutputsParams(regex="a"))
