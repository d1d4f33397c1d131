"""Render conversations to prompts with a model's chat template, which is untrusted code."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jaxinfer._utils.checks import describe
from jaxinfer.errors import ChatTemplateError
from jaxinfer.inputs import templates
from jaxinfer.inputs.message_parts import open_image
from jaxinfer.inputs.messages import conversations, images_of
from jaxinfer.inputs.plain_data import plain
from jaxinfer.inputs.template_messages import for_template

_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat",
        "chat_template",
        "conversation",
        "conversations",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "self",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)


def render_chat(
    tokenizer: Any,
    messages: Any,
    *,
    chat_template: Any = None,
    add_generation_prompt: Any = True,
    continue_final_message: Any = False,
    tools: Any = None,
    chat_template_kwargs: Any = None,
    image_marker: str | None = None,
    timeout_s: float = templates.TIMEOUT,
) -> str | list[str]:
    """Render the prompt of a conversation, or a prompt for each of a list of conversations.

    Messages are normalised as in vLLM (`jaxinfer.inputs.messages`), then rendered like transformers'
    `apply_chat_template`, in a worker process with time and memory limits (`jaxinfer.inputs.templates`). The prompt
    includes the special tokens written by the template: tokenise it with `add_special_tokens=False`.

    Args:
        tokenizer: transformers tokenizer.
        messages: dicts or objects with "role" and "content", or a list of such lists.
        chat_template: Jinja source used instead of the tokenizer's template, or the name of one of the tokenizer's
            templates if it has several.
        add_generation_prompt: whether to end with the header of the assistant's answer.
        continue_final_message: whether the answer continues the last message, or the name of the message field to
            continue.
        tools: dicts with the JSON schema of a function, or Python functions with type hints and a docstring.
        chat_template_kwargs: dict of further template variables, such as `{"enable_thinking": False}`; `tools`,
            `documents` and `continue_final_message` may be passed here as well.
        image_marker: text inserted for each image if the template does not handle images; None for text-only models.
        timeout_s: time limit per conversation, in seconds.

    Raises:
        TypeError: messages or arguments of the wrong type; the error names the message's index.
        ValueError: an empty conversation, a reserved key, or content that is not text.
        ChatTemplateError: the template is missing, raises (on an unknown role, for example), or exceeds the time,
            memory or length limit.
    """
    continued = None if continue_final_message is False else continue_final_message
    given = {"tools": tools, "continue_final_message": continued}
    variables = _variables(chat_template_kwargs, given)
    field = _continued(variables.pop("continue_final_message", None), add_generation_prompt)
    chats, several = conversations(messages, images=image_marker is not None)
    source = choose_template(tokenizer, chat_template, variables["tools"])
    special = {name: plain(_text(token)) for name, token in tokenizer.special_tokens_map.items()}
    variables = {"add_generation_prompt": add_generation_prompt, **special, **variables}
    takes = functools.partial(
        templates.message_forms,
        source,
        special_tokens=tuple((k, v) for k, v in special.items() if isinstance(v, str)),
        timeout_s=timeout_s,
    )
    prompts = [
        templates.render(source, for_template(chat, takes, image_marker), variables, field, timeout_s) for chat in chats
    ]
    return prompts if several else prompts[0]


def chat_images(messages: Any) -> list[list[Any]]:
    """Return the images of each conversation, in order, from messages accepted by `render_chat`.

    Raises:
        ValueError: a data URL does not contain a readable image.
    """
    return [
        [open_image(image, f"conversation {index}, image {place}") for place, image in enumerate(images_of(chat))]
        for index, chat in enumerate(conversations(messages, images=True)[0])
    ]


def _text(token: Any) -> Any:
    """Return the text of a special token, which some tokenizers store as an object with flags (`AddedToken`)."""
    return getattr(token, "content", token)


def _variables(kwargs: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template variables set by the caller as plain data, including "tools" and "documents".

    `given`: values of the variables that are also arguments of `render_chat`; None if not set.
    """
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"chat_template_kwargs must be a dict, got {describe(kwargs)}.")
    made = {"tools": None, "documents": None}
    for key, value in (kwargs or {}).items():
        if not isinstance(key, str):
            raise TypeError(f"every key of chat_template_kwargs must be a string, got {describe(key)}.")
        if key in _RESERVED or key.startswith("_"):
            raise ValueError(
                f"chat_template_kwargs cannot set {key!r}: the name is reserved and is not a variable of the template."
            )
        if given.get(key) is not None:
            raise ValueError(f"{key} is given twice: leave it out of chat_template_kwargs.")
        made[key] = value
    made |= {key: value for key, value in given.items() if value is not None}
    made["tools"] = _tools(made["tools"])
    documents = made["documents"]
    if documents is not None and not (
        isinstance(documents, (list, tuple)) and all(isinstance(one, Mapping) for one in documents)
    ):
        raise TypeError(f"documents must be a list of dicts with 'title' and 'text', got {describe(documents)}.")
    try:
        return plain(made)
    except RecursionError:
        raise ValueError("chat_template_kwargs are nested too deeply, or contain themselves.") from None


def _tools(tools: Any) -> list[Any] | None:
    """Convert tools to JSON schemas."""
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise TypeError(f"tools must be a list of dicts or functions, got {describe(tools)}.")
    return [_tool(tool, index) for index, tool in enumerate(tools)]


def _tool(tool: Any, index: int) -> Any:
    if isinstance(tool, Mapping) or hasattr(tool, "model_dump"):
        return tool
    if not callable(tool) or isinstance(tool, type):
        raise TypeError(f"tools[{index}] must be a dict or a function, got {describe(tool)}.")
    from transformers.utils import get_json_schema

    try:
        return get_json_schema(tool)
    except Exception as error:  # several types: docstring missing, type hint missing, or type hint unknown
        raise ValueError(f"tools[{index}] cannot be made into a JSON schema: {error}") from error


def _continued(field: Any, add_generation_prompt: Any) -> str | None:
    """Return the field of the last message that the answer continues; None if it starts a new message."""
    if not isinstance(add_generation_prompt, bool):
        raise TypeError(f"add_generation_prompt must be True or False, got {describe(add_generation_prompt)}.")
    if field is None or field is False:
        return None
    if not isinstance(field, (bool, str)):
        raise TypeError(f"continue_final_message must be True, False or the name of a field, got {describe(field)}.")
    if add_generation_prompt:
        raise ValueError(
            "continue_final_message needs add_generation_prompt=False: an answer cannot continue the last message and "
            "begin another one; pass one of them."
        )
    return "content" if field is True else field


def choose_template(tokenizer: Any, chat_template: Any, tools: Any = None) -> str:
    """Return the Jinja source with which chats are rendered; arguments are those of `render_chat`.

    Raises:
        ChatTemplateError: there is none, or none by the given name.
        TypeError: `chat_template` is no string.
    """
    if type(tokenizer).__module__.endswith("tokenization_mistral_common"):
        raise ChatTemplateError(
            "the tokenizer of mistral-common reads control tokens in a text as plain text, so that no rendered chat "
            "can be encoded: pass the folder of its tekken.json as tokenizer=, which is read without that package."
        )
    if chat_template is not None and not isinstance(chat_template, str):
        raise TypeError(f"chat_template must be a string of Jinja source, got {describe(chat_template)}.")
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, Mapping):
        return _one_of(own, chat_template, tools)
    if chat_template is not None:
        return chat_template
    if own is not None and not isinstance(own, str):
        raise ChatTemplateError(
            f"the tokenizer's chat template is {describe(own)}, no Jinja source: pass chat_template=."
        )
    if not own:
        raise ChatTemplateError(
            "the tokenizer has no chat template: pass chat_template= (Jinja source), or "
            "use generate() with a prompt you format yourself."
        )
    return own


def _one_of(templates: Mapping[str, Any], named: str | None, tools: Any) -> str:
    """Select one of a tokenizer's templates as transformers does.

    `named`: the caller's `chat_template`, a template name or Jinja source.
    """
    if named is not None and named not in templates:
        return named
    default = "tool_use" if tools is not None and "tool_use" in templates else "default"
    name = default if named is None else named
    if not isinstance(templates.get(name), str):
        raise ChatTemplateError(
            f"no chat template could be chosen: the tokenizer has {', '.join(sorted(map(str, templates)))}, and none "
            f"named {name!r}. Pass chat_template= with one of these names, or with Jinja source."
        )
    return templates[name]
