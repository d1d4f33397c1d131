"""Conversations made into prompts by a model's chat template, which is not trusted."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxinfer.checks import describe
from jaxinfer.errors import ChatTemplateError
from jaxinfer.text.deadline import run_with_deadline

TEMPLATE_TIMEOUT = 5.0
"""Seconds a conversation's template may run."""

_RESERVED = frozenset({
    "add_generation_prompt", "chat", "chat_template", "conversation", "conversations", "max_length",
    "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors",
    "sanitize_control_tokens", "self", "tokenize", "tokenizer_kwargs", "truncation",
})


def render_chat(tokenizer: Any, messages: Any, *, chat_template: Any = None,
                add_generation_prompt: Any = True, chat_template_kwargs: Any = None,
                image_marker: str | None = None, timeout_s: float = TEMPLATE_TIMEOUT) -> str | list[str]:
    """The prompt of a conversation, or one for each in a list of conversations.

    The template runs in transformers' sandbox, for a bounded time. The prompt holds the special tokens that
    the template writes: tokenise it with `add_special_tokens=False`. Contents given in parts are joined by
    line breaks, unless the model takes images and the template knows of such parts: then it gets them, the images
    themselves left out.

    Args:
        tokenizer: of transformers.
        messages: dicts with "role" and "content", or a list of such lists.
        chat_template: Jinja source used instead of the tokenizer's own, or the name of one of its several.
        add_generation_prompt: whether to end with the header of the assistant's answer.
        chat_template_kwargs: dict of further variables of the template, as `{"enable_thinking": False}`, and
            `tools`, `documents` and `continue_final_message` as in `apply_chat_template`.
        image_marker: what stands for an image where the template knows of none; None: the model takes text only.
        timeout_s: seconds a conversation may take.

    Raises:
        TypeError: messages or arguments of the wrong type; the message names the index.
        ValueError: an empty conversation, a reserved key, content that is not text.
        ChatTemplateError: no template, one that raises (an unknown role, for one), or one that runs too long.
    """
    options = _template_options(chat_template_kwargs)
    if not isinstance(add_generation_prompt, bool):
        raise TypeError("add_generation_prompt must be True or False, "
                        f"got {describe(add_generation_prompt)}.")
    several = _is_several(messages)
    conversations = [_conversation(chat, f"messages[{index}]" if several else "messages", image_marker is not None)
                     for index, chat in enumerate(messages if several else [messages])]
    source = _template(tokenizer, chat_template, options.get("tools"))
    tokens = _lex(source)
    _refuse_unbounded_arithmetic(tokens)
    if image_marker is None or not any(kind == "string" and "image" in text for _, kind, text in tokens):
        conversations = [[_joined(message, image_marker) for message in chat] for chat in conversations]
    render = functools.partial(tokenizer.apply_chat_template, chat_template=source, tokenize=False,
                               add_generation_prompt=add_generation_prompt, **options)
    prompts = [_run(functools.partial(render, chat), timeout_s) for chat in conversations]
    return prompts if several else prompts[0]


def chat_images(messages: Any) -> list[list[Any]]:
    """The images in the parts of messages that `render_chat` took, in order: a list for each conversation."""
    chats = messages if _is_several(messages) else [messages]
    return [[part["image"] for message in chat if _is_list(message.get("content"))
             for part in message["content"] if _is_image(part)] for chat in chats]


def _is_several(messages: Any) -> bool:
    """Whether these are conversations, not the messages of one."""
    return _is_list(messages) and len(messages) > 0 and all(_is_list(item) for item in messages)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def _template_options(kwargs: Any) -> dict[str, Any]:
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"chat_template_kwargs must be a dict, got {describe(kwargs)}.")
    for key in kwargs:
        if not isinstance(key, str):
            raise TypeError(f"every key of chat_template_kwargs must be a string, got {describe(key)}.")
        if key in _RESERVED or key.startswith("_"):
            raise ValueError(f"chat_template_kwargs cannot set {key!r}: the name is reserved, since "
                             "it is no variable of the template.")
    return dict(kwargs)


def _conversation(messages: Any, where: str, images: bool) -> list[dict[str, Any]]:
    if not _is_list(messages):
        raise TypeError(f"{where} must be a list of dicts with 'role' and 'content', "
                        f"got {describe(messages)}.")
    if not messages:
        raise ValueError(f"{where} cannot be empty: a conversation needs a message.")
    return [_message(message, f"{where}[{index}]", images) for index, message in enumerate(messages)]


def _message(message: Any, where: str, images: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} must be a dict with 'role' and 'content', got {describe(message)}.")
    if not isinstance(message.get("role"), str):
        raise TypeError(f"{where}['role'] must be a string, got {describe(message.get('role'))}.")
    message = _with_parsed_calls(message)
    content = message.get("content")
    if content is None and ("content" in message or message.get("tool_calls")):
        content = ""  # OpenAI's clients send None; many templates add the content to a string
    if _is_list(content):
        content = [_part(part, f"{where}['content'][{index}]", images) for index, part in enumerate(content)]
    elif not isinstance(content, str):
        parts = "text and image parts" if images else "text parts"
        raise TypeError(f"{where}['content'] must be a string or a list of {parts}, "
                        f"got {describe(content)}.")
    return {**message, "content": content}


def _with_parsed_calls(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message whose tool calls have objects as arguments: OpenAI's form has JSON in a string, templates encode it."""
    calls = message.get("tool_calls")
    if not _is_list(calls):
        return message
    return {**message, "tool_calls": [_parsed_call(call) for call in calls]}


def _parsed_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}
    except ValueError:
        return call  # a model may have written it; the template decides
    return {**call, "function": {**function, "arguments": parsed}}


def _part(part: Any, where: str, images: bool) -> dict[str, str]:
    """A part as templates know it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise TypeError(f"{where} must be a dict with 'type' and 'text', got {describe(part)}.")
    if images and _is_image(part):
        if part.get("image") is None:
            raise ValueError(f"{where} has no 'image': pass a PIL image or a NumPy array there; nothing is read from paths "
                             "or URLs.")
        return {"type": "image"}
    if part.get("type") != "text":
        takes = "text and images ({'type': 'image', 'image': ...})" if images else "text only"
        raise ValueError(f"{where} is of type {describe(part.get('type'))}: this model takes {takes}.")
    if not isinstance(part.get("text"), str):
        raise TypeError(f"{where}['text'] must be a string, got {describe(part.get('text'))}.")
    return {"type": "text", "text": part["text"]}


def _joined(message: dict[str, Any], image_marker: str | None) -> dict[str, Any]:
    """A message with its parts as one text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(image_marker if _is_image(part) else part["text"] for part in content)}


def _template(tokenizer: Any, chat_template: Any, tools: Any) -> str:
    if chat_template is not None and not isinstance(chat_template, str):
        raise TypeError(f"chat_template must be a string of Jinja source, got {describe(chat_template)}.")
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise ChatTemplateError("the tokenizer has no chat template: pass chat_template= (Jinja source), or "
                                "use generate() with a prompt you format yourself.")
    try:
        return tokenizer.get_chat_template(chat_template, tools)
    except ValueError as error:
        raise ChatTemplateError(f"no chat template could be chosen: {error}") from error


def _lex(source: str) -> list[tuple[int, str, str]]:
    """The tokens of a template, white space left out: line, kind and text.

    Raises:
        ChatTemplateError: it cannot be read as Jinja.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ChatTemplateError("chat templates need jinja2: pip install 'jinja2>=3.1.6'") from error
    try:
        return [token for token in jinja2.Environment().lex(source) if token[1] != "whitespace"]
    except jinja2.TemplateError as error:
        raise ChatTemplateError(f"the chat template is not valid Jinja: {error}") from error


def _refuse_unbounded_arithmetic(lexed: list[tuple[int, str, str]]) -> None:
    """Refuse products that one interpreter instruction may spend hours on, where no time limit reaches.

    Powers, and products of two variables: no model's template has either. Repeating a string or scaling by a
    small number stays allowed, as does `*` and `**` before the arguments of a call.

    Raises:
        ChatTemplateError: names the line.
    """
    for before, (line, kind, value), after in zip(lexed, lexed[1:], lexed[2:], strict=False):
        if kind != "operator" or value not in ("*", "**") or before[2] in ("(", ","):
            continue
        if value == "**" or not (_is_small(before) or _is_small(after)):
            raise ChatTemplateError(f"the chat template is refused: line {line} has "
                                    f"{before[2]} {value} {after[2]}, whose size is not bounded.")


def _is_small(token: tuple[int, str, str]) -> bool:
    _, kind, text = token
    return kind in ("string", "float") or (kind == "integer" and len(text) <= 4)


def _run(render: Callable[[], str], timeout_s: float) -> str:
    try:
        return run_with_deadline(render, timeout_s)
    except TimeoutError:
        raise ChatTemplateError(f"the chat template did not finish in {timeout_s:g} s: pass another "
                                "chat_template=, or a shorter conversation.") from None
    except Exception as error:
        detail = str(error) or type(error).__name__
        raise ChatTemplateError(f"the chat template failed: {detail}") from error
