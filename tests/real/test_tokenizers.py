"""Text of the tokenizers of real checkpoints: it continues its prompt, whatever the tokens, and each character comes at
once."""

import json
import os
import random
import shutil
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from jaxinfer.inputs.chat import render_chat
from jaxinfer.inputs.tokenizer import encode, load_tokenizer
from jaxinfer.results.detokenizer import Detokenizer

FOLDER = os.environ.get("JAXINFER_REAL_MODELS")
NAMES = ("SmolLM2-135M-Instruct", "gemma-3-270m")
BROKEN = "\N{REPLACEMENT CHARACTER}"
TEXTS = (
    "Once upon a time,\n\tin  a village.",
    "Привет, как дела?",
    "Καλημέρα, τι κάνεις;",
    "مرحبا كيف حالك",
    "שלום, מה שלומך",
    "नमस्ते, आप कैसे हैं",
    "สวัสดีครับ วันนี้",
    "你好，今天天气",
    "こんにちは、今日は",
    "안녕하세요, 오늘은",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f9a9\U0001f9a9 \U00010330\u0f67",
)

pytestmark = pytest.mark.skipif(FOLDER is None, reason="JAXINFER_REAL_MODELS names no folder of real checkpoints")


@cache
def tokenizer(name):
    return AutoTokenizer.from_pretrained(Path(FOLDER) / name)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_of_any_tokens_continues_its_prompt(name):
    made, rng = tokenizer(name), random.Random(0)
    known = max(made.get_vocab().values()) + 1
    for _ in range(400):
        ids = [rng.randrange(known) for _ in range(rng.randrange(12))]
        ids += made.encode(rng.choice(TEXTS) + rng.choice(TEXTS), add_special_tokens=False) + [
            rng.choice(made.all_special_ids)
        ]
        at, skip = rng.randrange(len(ids)), rng.random() < 0.5
        detokenizer = Detokenizer(made, prompt=ids[:at], skip_special_tokens=skip)
        text = "".join(detokenizer.push([token]) for token in ids[at:]) + detokenizer.finish()
        before, both = (made.decode(part, skip_special_tokens=skip) for part in (ids[:at], ids))
        if BROKEN in before[-12:]:  # the prompt ends inside a character, or perhaps in a run of byte tokens
            assert both.endswith(text)
        else:
            assert before + text == both


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_each_character_comes_with_its_last_token(name, text):
    made = tokenizer(name)
    detokenizer, shown = Detokenizer(made), ""
    ids = made.encode(text, add_special_tokens=False)
    for count, token in enumerate(ids, 1):
        shown += detokenizer.push([token])
        assert text.startswith(shown)
        whole = made.decode(ids[:count])
        assert len(shown) >= len(whole.rstrip(BROKEN))
    assert shown == text


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
PAD = {"content": "[PAD]", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
TUNED = {
    "a pad token beyond the vocabulary": {"pad_token": "[PAD]", "added_tokens_decoder": {"49152": PAD}},
    "named templates": {"chat_template": [{"name": name, "template": name + TEMPLATE} for name in ("default", "rag")]},
    "tokens by name": {"extra_special_tokens": {"image_token": "<image>"}, "tokenizer_class": "LlamaTokenizerFast"},
    "Qwen's class, left padding": {"tokenizer_class": "Qwen2Tokenizer", "padding_side": "left", "pad_token": None},
    "a class of its own": {"tokenizer_class": "OwnTokenizerFast", "add_bos_token": True, "bos_token": "<|im_start|>"},
}


@pytest.mark.parametrize("name", TUNED)
def test_what_tools_for_fine_tuning_leave_reads_as_in_transformers(tmp_path, name):
    source = Path(FOLDER) / NAMES[0]
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(source / file, tmp_path)
    said = json.loads((source / "tokenizer_config.json").read_text())
    own = {"chat_template": TEMPLATE, **said, **TUNED[name]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in own.items() if v is not None}))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello  world <|im_end|><image>[PAD] 你好", *TEXTS):
        ids = theirs.encode(text)
        assert encode(ours, text, special=True) == ids
        detokenizer = Detokenizer(ours, skip_special_tokens=False)
        assert detokenizer.push(ids) + detokenizer.finish() == theirs.decode(ids)
    chat = [{"role": "user", "content": "Hi"}]
    assert render_chat(ours, chat) == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
