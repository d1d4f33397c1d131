"""Fuzz chat templates and the conversations that they render."""

import functools
import json
import random
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fuzzing.mutations import broken
from fuzzing.part import Part
from jaxinfer import demo
from jaxinfer.inputs.chat import render_chat

STYLES = Path(__file__).resolve().parents[2] / "tests/support/chat_templates.py"
SECONDS = 1.0
"""Time limit of a template in seconds, well below that of an input."""
PIECES = (
    "{{ messages }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if tools %}",
    "{% endif %}",
    "{{ ''.__class__ }}",
    "{{ range(10 ** 9) | list }}",
    "{% for i in range(10 ** 12) %}{% endfor %}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ 'x' * 10 ** 7 }}",
    "{% set ns = namespace(x=1) %}",
    "{{ 10 ** 10 ** 8 }}",
    "{% include 'x' %}",
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    "{{ strftime_now('%Y') }}",
    "{{ messages | tojson(indent=2) }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{#",
    "{{ messages[0].content.format(x=1) }}",
    "{% raw %}",
    "{{ none.x }}",
    "{{ loop.index }}",
    "{% break %}",
    "\ud800",
    "\x00",
    "{% generation %}",
    "{% endgeneration %}",
    "{{ cycler.x }}",
    "{{ messages | map(attribute='content') | join }}",
    "{{ (((",
    "%}",
)
"""Snippets inserted into templates."""
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "é"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
    },
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "f", "content": {"y": 2}},
    {"role": "assistant", "content": "done", "reasoning_content": "hm"},
    {"role": "user", "content": "so?"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]


@functools.cache
def templates() -> list[str]:
    """Return valid templates: in the styles of published models, and the packaged checkpoint's."""
    styles = runpy.run_path(str(STYLES))
    found = [text for name, text in sorted(styles.items()) if name.isupper() and isinstance(text, str)]
    return [*found, (Path(demo.path()) / "chat_template.jinja").read_text()]


def broken_text(rng: random.Random, text: str) -> str:
    """Return the text with one to four pieces deleted, duplicated, moved or inserted."""
    for _ in range(rng.randint(1, 4)):
        at, length, to = rng.randrange(len(text) + 1), rng.randint(1, 40), rng.randrange(len(text) + 1)
        piece = text[at : at + length]
        how = rng.randrange(5)
        if how == 0:
            text = text[:at] + text[at + length :]
        elif how == 1:
            text = text[:to] + piece + text[to:]
        else:
            text = text[:to] + rng.choice(PIECES) + text[to:]
    return text


def make_template(rng: random.Random, folder: Path) -> Callable[[], object]:
    """Corrupt a template, or the conversation that it renders."""
    source = rng.choice(templates())
    chat, options = CHAT[: rng.randint(1, len(CHAT))], {"tools": TOOLS} if rng.random() < 0.5 else {}
    if rng.random() < 0.7:
        source = broken_text(rng, source)
    else:
        chat = broken(rng, chat)
    if rng.random() < 0.2:
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    tokenizer = SimpleNamespace(chat_template=source, special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"})
    (folder / "input.json").write_text(json.dumps({"template": source, "chat": repr(chat)}))
    return lambda: render_chat(
        tokenizer, chat, timeout_s=SECONDS, image_marker=rng.choice((None, "<image>")), **options
    )


PARTS = (Part("template", make_template),)
