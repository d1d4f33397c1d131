"""The packaged checkpoint answers as accurately here as in transformers, above a minimum."""

import pytest

from jaxinfer import LLM, SamplingParams, demo

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]
COUNT = 200
PARAMS = SamplingParams(temperature=0, max_tokens=48)


@pytest.fixture(scope="module")
def answers():
    """jaxinfer's answers to held-out questions, as plain prompts and as chats."""
    questions = demo.heldout_questions(COUNT)
    with LLM(demo.path(), use_tqdm=False) as llm:
        plain = llm.generate([q.prompt for q in questions], PARAMS, use_tqdm=False)
        chat = llm.chat([q.chat_messages for q in questions], PARAMS, use_tqdm=False)
    return questions, *([o.outputs[0].text for o in outputs] for outputs in (plain, chat))


def accuracy(questions, texts) -> float:
    return sum(q.is_correct(text) for q, text in zip(questions, texts, strict=True)) / len(questions)


def test_nineteen_of_twenty_held_out_questions_are_answered(answers):
    questions, plain, chat = answers
    assert accuracy(questions, plain) >= 0.95
    assert accuracy(questions, chat) >= 0.95


def test_transformers_is_as_accurate(answers):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    questions, plain, _ = answers
    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    model = AutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.float32).eval()
    texts = []
    for question in questions:
        ids = tokenizer(question.prompt, return_tensors="pt").input_ids
        out = model.generate(ids, do_sample=False, max_new_tokens=PARAMS.max_tokens)
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert accuracy(questions, texts) == accuracy(questions, plain)


def test_int8_weights_lose_at_most_a_point(answers):
    questions, plain, _ = answers
    with LLM(demo.path(), quantization="int8", use_tqdm=False) as llm:
        outputs = llm.generate([q.prompt for q in questions], PARAMS, use_tqdm=False)
    assert accuracy(questions, [o.outputs[0].text for o in outputs]) >= accuracy(questions, plain) - 0.01
