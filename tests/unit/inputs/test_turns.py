"""Test chat templates in the style of Gemma and gpt-oss: each marker is one token, and BOS occurs once."""

import datetime

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from jaxinfer.errors import ChatTemplateError
from jaxinfer.inputs.chat import render_chat
from jaxinfer.results.detokenizer import Detokenizer

MARKERS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|start|>", "<|message|>", "<|end|>", "<|channel|>")

GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}{% set rest = "
    "messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% "
    "endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% elif message['content'] is iterable %}{% for part in message['content'] %}"
    "{{ '<start_of_image>' if part['type'] == 'image' else part['text'] | trim }}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""In the style of Gemma: the system message is part of the first turn, and the assistant's role is "model"."""

HARMONY = (
    "{%- macro marked(role, text, channel=none) -%}"
    "{{ '<|start|>' + role }}{% if channel %}{{ '<|channel|>' + channel }}{% endif %}{{ '<|message|>' + text + "
    "'<|end|>' }}"
    "{%- endmacro -%}"
    "{%- set state = namespace(last=none) -%}"
    "{{ marked('system', 'Current date: ' + strftime_now('%Y-%m-%d') + '\nReasoning: ' + reasoning_effort | "
    "default('medium')) }}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}{{ marked('assistant', message.content, 'final') }}"
    "{%- else -%}{{ marked(message.role, message.content) }}{%- endif -%}"
    "{%- set state.last = message.role -%}{%- endfor -%}"
    "{%- if add_generation_prompt and state.last != 'assistant' -%}<|start|>assistant{%- endif -%}"
)
"""In the style of gpt-oss: macros, a namespace, the date, and a caller-defined variable."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Gemma's: byte fallback, spaces as ▁, no space before the first word, <bos> added."""
    from tokenizers.processors import TemplateProcessing

    pieces = [*MARKERS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "user", "model", "\n"]
    ids = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *map(chr, range(33, 127))]))}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(list(MARKERS))
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


CHAT = [
    {"role": "user", "content": " hi é "},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "so?"},
]


def markers(tokenizer, text: str) -> list[str]:
    """Return the marker tokens of a rendered prompt, in order, tokenised as by `LLM.chat`."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [token for token in tokenizer.convert_ids_to_tokens(ids) if token in MARKERS]


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "be brief"}]])
def test_turns_of_gemma(tokenizer, system):
    text = render_chat(tokenizer, [*system, *CHAT], chat_template=GEMMA)
    own = "be brief\n\n" if system else ""
    assert text == (
        f"<bos><start_of_turn>user\n{own}hi é<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>\n"
        "<start_of_turn>user\nso?<end_of_turn>\n<start_of_turn>model\n"
    )
    turn = ["<start_of_turn>", "<end_of_turn>"]
    assert markers(tokenizer, text) == ["<bos>", *turn * 3, "<start_of_turn>"]


def test_turns_that_a_template_refuses(tokenizer):
    with pytest.raises(ChatTemplateError, match="turns must alternate"):
        render_chat(tokenizer, [*CHAT, CHAT[0]], chat_template=GEMMA)


def test_a_template_joins_parts_of_text_itself(tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert "user\nab<end_of_turn>" in render_chat(tokenizer, parts, chat_template=GEMMA)
    with pytest.raises(ValueError, match="this model takes text only"):
        picture = [{"role": "user", "content": [{"type": "image", "image": object()}]}]
        render_chat(tokenizer, picture, chat_template=GEMMA)


def test_channels_of_gpt_oss(tokenizer):
    days = [datetime.date.today().isoformat()]
    text = render_chat(tokenizer, CHAT, chat_template=HARMONY, chat_template_kwargs={"reasoning_effort": "low"})
    days.append(datetime.date.today().isoformat())  # the next one, over midnight
    assert text in [
        f"<|start|>system<|message|>Current date: {today}\nReasoning: low<|end|><|start|>user<|message|> hi é <|end|>"
        "<|start|>assistant<|channel|>final<|message|>yes<|end|><|start|>user<|message|>so?<|end|><|start|>assistant"
        for today in days
    ]
    assert markers(tokenizer, text).count("<|message|>") == 4
    assert "Reasoning: medium" in render_chat(tokenizer, CHAT, chat_template=HARMONY)


@pytest.mark.parametrize("skip", [True, False])
def test_markers_in_what_is_made_are_skipped_or_shown(tokenizer, skip):
    text = "<|channel|>final<|message|>só,  é?<|end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    made = "".join(detokenizer.push([token]) for token in ids) + detokenizer.finish()
    assert made == ("finalsó,  é?" if skip else text)
