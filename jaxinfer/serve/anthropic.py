"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's API, converted to chat completions."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxinfer._utils.checks import describe
from jaxinfer.outputs import CompletionOutput, RequestOutput
from jaxinfer.results.output_streams import OutputStream
from jaxinfer.serve import anthropic_input, sampling, structure
from jaxinfer.serve.body import Fields, read_json
from jaxinfer.serve.chat import ChatCall, add, visible
from jaxinfer.serve.context import Context, new_id, of
from jaxinfer.serve.errors import APIError, Json, about
from jaxinfer.serve.parsing import CALLS, AnswerParser, message_of
from jaxinfer.serve.streaming import event, merged, respond
from jaxinfer.serve.structure import CallParser, Structure
from jaxinfer.serve.usage import first_of

PROMPT = ("model", "messages", "system", "tools", "tool_choice")
IGNORED = ("metadata", "service_tier", "thinking", "cache_control", "context_management", "inference_geo")
IGNORED += ("output_config", "diagnostics", "speed", "user_profile_id", "workspace_id")
"""Fields without effect on the answer. Whether a model thinks depends on its chat template."""
READ = ("max_tokens", "stop_sequences", "stream", "temperature", "top_p", "top_k")
KNOWN = frozenset({*PROMPT, *IGNORED, *READ})
NEUTRAL: Mapping[str, Sequence[Any]] = {"mcp_servers": [[]], "container": []}
"""Fields that are not supported, with the values that change nothing."""


async def messages(request: Request) -> Response:
    """Answer a conversation."""
    context = of(request)
    fields = Fields(await read_json(request, context.config))
    fields.check_known(KNOWN, NEUTRAL)
    fields.need("max_tokens", int)
    given = {name: fields.raw(name) for name in READ if name != "stop_sequences"}
    common = Fields(given | {"stop": fields.get("stop_sequences", list)})
    chat, options = _prompt(context, fields)
    options["adapter"] = context.check_model(fields.get("model", str))
    shape = _structure(fields, options.get("tools"))
    params = visible(context, sampling.read(context, common, logprobs=None, structure=shape))
    streamed = fields.get("stream", bool, False)
    before = 0 if fields.raw("system") is None else 1
    call = ChatCall(chat, params, options, streamed=streamed, structure=shape, before=before)
    name = new_id("msg")

    async def queue() -> list[OutputStream]:
        return [await add(context, call, name)]

    return await respond(
        request,
        queue,
        streamed=streamed,
        events=lambda streams: _events(context, call, name, streams),
        whole=lambda outputs: _complete(context, call, name, first_of(outputs)),
        anthropic=True,
    )


async def count_tokens(request: Request) -> Response:
    """Return the number of tokens of a conversation."""
    context = of(request)
    fields = Fields(await read_json(request, context.config))
    fields.check_known({*PROMPT, *IGNORED}, NEUTRAL)
    chat, options = _prompt(context, fields)
    with about("messages", before=0 if fields.raw("system") is None else 1):
        return Json({"input_tokens": len(await context.llm.tokenize_chat(chat, **options))})


def _prompt(context: Context, fields: Fields) -> tuple[list[Any], dict[str, Any]]:
    """Return the messages of a request in OpenAI's form, and the arguments of `AsyncLLM.add_chat`."""
    context.check_model(fields.get("model", str))
    chat = anthropic_input.conversation(fields.raw("system"), fields.need("messages", list))
    options: dict[str, Any] = {}
    tools = anthropic_input.tools(fields.get("tools", list))
    if tools and _choice(fields) != "none":
        options["tools"] = tools
    if chat and chat[-1]["role"] == "assistant":  # the answer continues this message
        options |= {"add_generation_prompt": False, "continue_final_message": True}
    return chat, options


def _choice(fields: Fields) -> Any:
    """Return the tool choice in OpenAI's form."""
    asked = fields.get("tool_choice", dict, {"type": "auto"})
    kind, same = asked.get("type"), {"auto": "auto", "none": "none", "any": "required"}
    if kind == "tool":
        return {"type": "function", "function": {"name": asked.get("name")}}
    if kind not in same:
        raise APIError(
            f"tool_choice must be of type auto, none, any or tool, got {describe(kind)}.", param="tool_choice"
        )
    return same[kind]


def _structure(fields: Fields, tools: Sequence[Any] | None) -> Structure | None:
    """Return the structure of an answer: tool calls that it must make, else that of its format."""
    choice = fields.get("tool_choice", dict, {})
    calls = structure.of_choice(_choice(fields), tools, parallel=choice.get("disable_parallel_tool_use") is not True)
    form = fields.get("output_config", dict, {}).get("format")
    return structure.of_format(form, "output_config.format", None) if calls is None else calls


def _usage(output: RequestOutput, made: int) -> dict[str, Any]:
    cached = output.num_cached_tokens
    return {
        "input_tokens": len(output.prompt_token_ids) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": made,
    }


def _stop(sample: CompletionOutput, parser: AnswerParser | CallParser) -> dict[str, Any]:
    """Return the stop reason of an answer."""
    if isinstance(sample.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": sample.stop_reason}
    if sample.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    return {"stop_reason": "tool_use" if parser.calls else "end_turn", "stop_sequence": None}


def _message(model: str, name: str, content: list[Any], usage: dict[str, Any]) -> dict[str, Any]:
    made = {"id": name, "type": "message", "role": "assistant", "model": model}
    return made | {"content": content, "stop_reason": None, "stop_sequence": None, "usage": usage}


def _complete(context: Context, call: ChatCall, name: str, output: RequestOutput) -> dict[str, Any]:
    [sample] = output.outputs
    parser = call.parser(context, output.prompt)
    message = message_of(parser.push(sample.text, last=True))
    content: list[dict[str, Any]] = []
    if message.get("reasoning_content"):
        content.append({"type": "thinking", "thinking": message["reasoning_content"], "signature": ""})
    if message["content"]:
        content.append({"type": "text", "text": message["content"]})
    for one in message.get(CALLS, ()):
        function = one["function"]
        values = anthropic_input.arguments(function["arguments"])
        content.append({"type": "tool_use", "id": one["id"], "name": function["name"], "input": values})
    usage = _usage(output, len(sample.token_ids))
    return _message(call.model(context), name, content, usage) | _stop(sample, parser)


class Blocks:
    """Content blocks of a streamed answer: opened at the first delta of a kind, closed at the next kind."""

    def __init__(self) -> None:
        self._index, self._open = -1, ""

    def add(self, delta: dict[str, Any]) -> list[bytes]:
        """Return the events of a delta of `AnswerParser`."""
        if CALLS in delta:
            return [data for call in delta[CALLS] for data in self._call(call)]
        if "reasoning_content" in delta:
            found = self._switch("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            return [*found, self._delta({"type": "thinking_delta", "thinking": delta["reasoning_content"]})]
        found = self._switch("text", {"type": "text", "text": ""})
        return [*found, self._delta({"type": "text_delta", "text": delta["content"]})]

    def _call(self, call: dict[str, Any]) -> list[bytes]:
        block = {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}}
        found = self._switch(call["id"], block)
        return [*found, self._delta({"type": "input_json_delta", "partial_json": call["function"]["arguments"]})]

    def _switch(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        if kind == self._open:
            return []
        found = self.close()
        self._index, self._open = self._index + 1, kind
        return [*found, _named({"type": "content_block_start", "index": self._index, "content_block": block})]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _named({"type": "content_block_delta", "index": self._index, "delta": delta})

    def close(self) -> list[bytes]:
        """Return the event that ends the open block, if one is open."""
        was, self._open = self._open, ""
        return [_named({"type": "content_block_stop", "index": self._index})] if was else []


def _named(data: dict[str, Any]) -> bytes:
    return event(data, data["type"])


async def _events(
    context: Context, call: ChatCall, name: str, streams: Sequence[OutputStream]
) -> AsyncGenerator[bytes, None]:
    parser, blocks, made = None, Blocks(), 0
    async for _, output in merged(streams):
        [sample] = output.outputs
        if parser is None:
            parser = call.parser(context, output.prompt)
            message = _message(call.model(context), name, [], _usage(output, 0))
            yield _named({"type": "message_start", "message": message})
        made += len(sample.token_ids)
        for delta in parser.push(sample.text, last=sample.finished):
            for data in blocks.add(delta):
                yield data
        if sample.finished:
            for data in blocks.close():
                yield data
            yield _named({"type": "message_delta", "delta": _stop(sample, parser), "usage": _usage(output, made)})
    yield _named({"type": "message_stop"})
