"""`GET /v1/models`, `POST /tokenize`, `POST /detokenize`, `GET /health`."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.serve.body import Fields, read_json
from jaxinfer.serve.chat import tools_of
from jaxinfer.serve.context import Context, of
from jaxinfer.serve.errors import APIError, Json, about

CHAT_OPTIONS = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")
"""Fields of `/tokenize` that are arguments of `AsyncLLM.tokenize_chat`."""


async def health(request: Request) -> Response:
    """Return an empty response if the engine can run steps."""
    of(request).llm.check_alive()
    return Response(status_code=200)


def _model(context: Context, adapter: str | None = None) -> dict[str, Any]:
    parent = {} if adapter is None else {"parent": context.config.model_name}
    return {
        "id": adapter or context.config.model_name,
        "object": "model",
        "created": context.created,
        "owned_by": "jaxinfer",
        "max_model_len": context.llm.max_model_len,
        **parent,
    }


async def models(request: Request) -> Response:
    """List the model and its adapters."""
    context = of(request)
    return Json({"object": "list", "data": [_model(context, context.check_model(name)) for name in context.models]})


async def model(request: Request) -> Response:
    """Describe the model or an adapter."""
    context = of(request)
    return Json(_model(context, context.check_model(request.path_params["name"])))


async def tokenize(request: Request) -> Response:
    """Return the token ids of a prompt or of a conversation."""
    context = of(request)
    fields = Fields(await read_json(request, context.config))
    fields.check_known(("model", "prompt", "messages", *CHAT_OPTIONS), {})
    context.check_model(fields.get("model", str))
    tools_of(fields)
    prompt, messages = fields.get("prompt", str), fields.get("messages", list)
    if (prompt is None) == (messages is None):
        raise APIError("tokenize takes either prompt or messages.", param="prompt")
    if prompt is not None:
        with about("prompt"):
            tokens = await context.llm.tokenize(prompt)
    else:
        given = {name: fields.raw(name) for name in CHAT_OPTIONS if fields.raw(name) is not None}
        with about("messages"):
            tokens = await context.llm.tokenize_chat(messages, **given)
    return Json({"tokens": tokens, "count": len(tokens), "max_model_len": context.llm.max_model_len})


async def detokenize(request: Request) -> Response:
    """Return the text of token ids, with special tokens."""
    context = of(request)
    fields = Fields(await read_json(request, context.config))
    fields.check_known(("model", "tokens"), {})
    context.check_model(fields.get("model", str))
    tokens, tokenizer = fields.need("tokens", list), context.llm.get_tokenizer()
    if tokenizer is None:
        raise APIError("this server has no tokenizer (skip_tokenizer_init)")
    for index, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < len(tokenizer):
            raise APIError(
                f"tokens[{index}] must be a token id from 0 to {len(tokenizer) - 1}, got {str(token)[:40]}.",
                param="tokens",
            )
    decode = tokenizer.decode
    return Json({"prompt": await asyncio.to_thread(decode, tokens, clean_up_tokenization_spaces=False)})
