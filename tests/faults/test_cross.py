"""Prompts of an encoder-decoder: every form there is, every wrong one named, the others unharmed."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
from faults.conftest import SETTINGS
from support.cross import START, folder

from jaxinfer import LLM, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams
from jaxinfer.errors import CapacityError

pytestmark = [pytest.mark.xdist_group("cross faults"), pytest.mark.slow]

VOCAB = 320
LONGEST = 48
PARAMS = SamplingParams(temperature=0, max_tokens=8)
TEXT = "the cat sat on the mat"


@pytest.fixture(scope="module")
def shared_llm() -> Iterator[LLM]:
    made = folder(
        vocab_size=VOCAB, max_position_embeddings=LONGEST, bos_token_id=0, eos_token_id=1, with_tokenizer=True
    )
    with LLM(made, **SETTINGS | dict(max_model_len=40)) as llm:
        yield llm


def tokens(outputs) -> list[list[int]]:
    return [list(one.token_ids) for output in outputs for one in output.outputs]


def reading(llm: LLM, name: str) -> float:
    return {metric.name: metric.value for metric in llm.get_metrics()}[f"jaxinfer:{name}"]


def test_every_form_of_an_encoder_prompt_gives_the_same(llm):
    ids = llm.get_tokenizer().encode(TEXT)
    forms = [
        TEXT,
        ids,
        {"prompt": TEXT},
        {"prompt_token_ids": ids},
        {"encoder_prompt": TEXT},
        {"encoder_prompt": ids},
        {"encoder_prompt": {"prompt": TEXT}, "decoder_prompt": None},
        {"encoder_prompt": {"prompt_token_ids": ids}, "decoder_prompt": [START]},
    ]
    before = reading(llm, "encoder_inputs")
    made = llm.generate(forms, PARAMS)
    assert tokens(made) == tokens(made[:1]) * len(forms)
    assert reading(llm, "encoder_inputs") == before + 1, "one text, one run"
    for output in made:
        assert list(output.prompt_token_ids) == [START] and list(output.encoder_prompt_token_ids) == ids
    assert made[0].encoder_prompt == TEXT and made[0].prompt is None and made[1].encoder_prompt is None


def test_an_asyncio_program_gets_the_same_output(llm):
    async def last() -> RequestOutput:
        outputs = AsyncLLM.of(llm).generate(TEXT, replace(PARAMS, output_kind=RequestOutputKind.FINAL_ONLY))
        return [output async for output in outputs][-1]

    [expected], found = llm.generate(TEXT, PARAMS), asyncio.run(last())
    assert tokens([found]) == tokens([expected]) and found.encoder_prompt == TEXT
    assert found.encoder_prompt_token_ids == expected.encoder_prompt_token_ids


def test_a_decoder_prompt_follows_the_start_token(llm):
    known = llm.get_tokenizer().encode("hello", add_special_tokens=False)
    forms = [
        {"encoder_prompt": TEXT, "decoder_prompt": one}
        for one in ("hello", known, [START, *known], {"prompt": "hello"})
    ]
    made = llm.generate(forms, PARAMS)
    assert all(list(output.prompt_token_ids) == [START, *known] for output in made)
    assert tokens(made) == tokens(made[:1]) * len(forms) and made[0].prompt == "hello"
    assert tokens(made[:1]) != tokens(llm.generate(TEXT, PARAMS))


def test_a_stream_is_the_whole_call(llm):
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=12, n=2, ignore_eos=True)
    [whole] = llm.generate(TEXT, params)
    text = ["", ""]
    for update in llm.stream(TEXT, params):
        for output in update.outputs:
            text[output.index] += output.text
    assert text == [output.text for output in whole.outputs]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("", ValueError, "prompt 1: The encoder prompt cannot be empty"),
        ([], ValueError, "prompt 1: The encoder prompt cannot be empty"),
        ({"encoder_prompt": ""}, ValueError, "prompt 1: The encoder prompt cannot be empty"),
        ({"encoder_prompt": TEXT, "decoder_prompt": []}, ValueError, "prompt 1: The decoder prompt cannot be empty"),
        ({"decoder_prompt": "hello"}, ValueError, "prompt 1: a dict with 'decoder_prompt' needs 'encoder_prompt'"),
        ({"encoder_prompt": None}, ValueError, "prompt 1: a dict of an encoder-decoder needs 'encoder_prompt'"),
        (
            {"encoder_promt": "a"},
            ValueError,
            "prompt 1: unknown key str 'encoder_promt'; .*, or encoder_prompt and decoder_prompt",
        ),
        ({}, ValueError, "prompt 1: a dict needs 'prompt' or 'prompt_token_ids', or encoder_prompt and decoder_prompt"),
        ({"encoder_prompt": None, "decoder_prompt": "a"}, ValueError, "prompt 1: .* needs 'encoder_prompt'"),
        (
            {"encoder_prompt": 3},
            TypeError,
            "prompt 1: the encoder prompt must be a string, a list of token ids or a dict, got int",
        ),
        ({"encoder_prompt": TEXT, "prompt": "x"}, ValueError, "prompt 1: unknown key str 'prompt'"),
        ({"prompt": TEXT, "multi_modal_data": {"image": 1}}, ValueError, "prompt 1: this model takes text only"),
        ([5, VOCAB], ValueError, f"prompt 1: token id {VOCAB} at position 1 is out of vocabulary"),
        ([5, -1], ValueError, "prompt 1: token id -1"),
        ([5, 2**40], ValueError, "prompt 1: token id"),
        ([5, True], TypeError, "prompt 1: token id bool True at position 1"),
        ({"encoder_prompt": TEXT, "decoder_prompt": [VOCAB]}, ValueError, f"prompt 1: token id {VOCAB}"),
        (
            [7] * (LONGEST + 1),
            ValueError,
            rf"prompt 1: The encoder prompt \(length {LONGEST + 1}\) is longer than the {LONGEST} positions",
        ),
        ("a" * 100_000, ValueError, "prompt 1: the text has 100000 characters"),
        (
            {"encoder_prompt": TEXT, "decoder_prompt": [7] * 40},
            ValueError,
            r"prompt 1: The decoder prompt \(length 41\).*40",
        ),
    ],
)
def test_a_wrong_prompt_ends_the_call_by_name(llm, wrong, error, message):
    with pytest.raises(error, match=message):
        llm.generate([TEXT, wrong, "hello"], PARAMS)
    assert not llm._engine.requests and not llm._engine.has_work


def test_the_longest_of_both_is_served(llm):
    whole = {"encoder_prompt": [7] * LONGEST, "decoder_prompt": [START, *[7] * 38]}
    [output] = llm.generate(whole, SamplingParams(temperature=0, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 1 and output.outputs[0].finish_reason == "length"


def test_what_can_never_fit_beside_what_it_reads_is_refused(llm, host):
    with host(pool_blocks=LONGEST // 4):
        with pytest.raises(
            CapacityError, match=rf"prompt 1: .* 1 tokens can never fit .* beside the {LONGEST} positions"
        ):
            llm.generate([TEXT, [7] * LONGEST], PARAMS)
        assert (
            len(
                llm.generate([[7] * (LONGEST - 8)], SamplingParams(max_tokens=30, ignore_eos=True))[0]
                .outputs[0]
                .token_ids
            )
            == 7
        )


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (dict(forced_bos_token_id=VOCAB), f"forced_bos_token_id contains {VOCAB}, outside the vocabulary"),
        (dict(forced_eos_token_id=-2), "forced_eos_token_id must be at least -1"),
        (dict(no_repeat_ngram_size=17), "no_repeat_ngram_size must be between 0 and 16"),
        (dict(no_repeat_ngram_size=-1), "no_repeat_ngram_size must be at least 0"),
    ],
)
def test_settings_out_of_range(llm, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(TEXT, SamplingParams(**params))


def test_forced_tokens(llm):
    """The first only where the decoder begins; both whatever the sampler would say."""
    forced = SamplingParams(temperature=0, max_tokens=5, forced_bos_token_id=9, forced_eos_token_id=11, ignore_eos=True)
    forms = [TEXT, {"encoder_prompt": TEXT, "decoder_prompt": [START, 5]}]
    begun, later = tokens(llm.generate(forms, forced))
    assert begun[0] == 9 and begun[-1] == later[-1] == 11 and later[0] != 9 and len(begun) == len(later) == 5


def test_without_a_tokenizer_text_is_refused():
    made = folder(
        vocab_size=VOCAB, max_position_embeddings=LONGEST, bos_token_id=0, eos_token_id=1, with_tokenizer=True
    )
    with (
        LLM(made, skip_tokenizer_init=True, **SETTINGS | dict(max_model_len=40)) as llm,
        pytest.raises(ValueError, match="prompt 0 is text, but there is no tokenizer"),
    ):
        llm.generate(TEXT, PARAMS)
