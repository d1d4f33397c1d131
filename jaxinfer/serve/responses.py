"""`POST /v1/responses`: OpenAI's responses without stored state, converted to chat completions."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxinfer._utils.checks import describe
from jaxinfer.outputs import CompletionOutput, RequestOutput
from jaxinfer.results.output_streams import OutputStream
from jaxinfer.serve import sampling, structure
from jaxinfer.serve.body import Fields, read_json
from jaxinfer.serve.chat import ChatCall, add, visible
from jaxinfer.serve.context import new_id, of
from jaxinfer.serve.errors import APIError, wrong_type
from jaxinfer.serve.parsing import CALLS, AnswerParser, message_of
from jaxinfer.serve.response_items import Items, items_of
from jaxinfer.serve.streaming import event, merged, respond
from jaxinfer.serve.structure import CallParser
from jaxinfer.serve.usage import first_of

READ = ("temperature", "top_p", "stream", "max_output_tokens")
IGNORED = ("include", "truncation", "client_metadata")
"""Fields that change nothing about the answer, beside `sampling.IGNORED`."""
KNOWN = frozenset(
    {*sampling.IGNORED, *IGNORED, *READ, "model", "input", "instructions", "tools", "tool_choice", "reasoning", "text"}
)
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "background": [False],
    "conversation": [],
    "max_tool_calls": [],
    "previous_response_id": [],
    "prompt": [],
    "stream_options": [],
    "top_logprobs": [0],
}
"""Fields that are not supported, with the values that change nothing."""


async def responses(request: Request) -> Response:
    """Answer a conversation; nothing is stored."""
    context = of(request)
    fields = Fields(await read_json(request, context.config))
    fields.check_known(KNOWN, NEUTRAL)
    adapter = context.check_model(fields.get("model", str))
    options, form = _options(fields) | {"adapter": adapter}, fields.get("text", dict, {}).get("format")
    parallel = fields.get("parallel_tool_calls", bool, True)
    shape = structure.of_choice(_choice(fields), options.get("tools"), parallel=parallel)
    if shape is None:
        shape = structure.of_format(form, "text.format", None)
    common = Fields({name: fields.raw(name) for name in READ})
    params = sampling.read(context, common, logprobs=None, limit="max_output_tokens", structure=shape)
    params = visible(context, params)
    streamed = fields.get("stream", bool, False)
    before = 0 if fields.raw("instructions") is None else 1
    call = ChatCall(
        conversation(fields), params, options, streamed=streamed, structure=shape, field="input", before=before
    )
    base = _base(fields, call.model(context), params.temperature, params.top_p)

    async def queue() -> list[OutputStream]:
        return [await add(context, call, base["id"])]

    def parser(output: RequestOutput) -> AnswerParser | CallParser:
        return call.parser(context, output.prompt)

    return await respond(
        request,
        queue,
        streamed=streamed,
        events=lambda streams: _events(base, parser, streams),
        whole=lambda outputs: _complete(base, parser, first_of(outputs)),
    )


def conversation(fields: Fields) -> list[dict[str, Any]]:
    """Return the messages of a request in the form of chat completions."""
    instructions, items = fields.get("instructions", str), fields.raw("input")
    found = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(items, str):
        return [*found, {"role": "user", "content": items}]
    if not isinstance(items, list):
        raise wrong_type("input", "a string or a list of items", items)
    for index, item in enumerate(items):
        found.append(_item(item, f"input[{index}]"))
    return found


def _item(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise wrong_type(where, "an item, an object with a type", item)
    kind = item.get("type", "message")
    if kind == "message":
        return {name: item[name] for name in ("role", "content") if name in item}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": "", CALLS: [call]}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    if kind == "reasoning":
        parts = item.get("content") or []
        text = "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
        return {"role": "assistant", "content": "", "reasoning_content": text}
    raise APIError(
        f"{where} is of type {describe(kind)}: this server takes message, function_call, function_call_output and "
        "reasoning.",
        param="input",
    )


def _choice(fields: Fields) -> Any:
    """Return the tool choice in the form of chat completions."""
    choice = fields.raw("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _options(fields: Fields) -> dict[str, Any]:
    """Return the arguments of `AsyncLLM.add_chat`."""
    options: dict[str, Any] = {}
    effort = fields.get("reasoning", dict, {}).get("effort")
    if effort is not None:
        options["chat_template_kwargs"] = {"reasoning_effort": effort}
    tools = []
    for index, tool in enumerate(fields.get("tools", list, [])):
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("name"), str):
            raise wrong_type(f"tools[{index}]", "an object with type 'function' and a name", tool)
        names = ("name", "description", "parameters")
        tools.append({"type": "function", "function": {name: tool[name] for name in names if name in tool}})
    if tools and fields.raw("tool_choice") != "none":
        options["tools"] = tools
    return options


def _base(fields: Fields, model: str, temperature: float, top_p: float) -> dict[str, Any]:
    """Return the fields of a response that do not depend on the answer."""
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": fields.raw("instructions"),
        "max_output_tokens": fields.raw("max_output_tokens"),
        "metadata": fields.raw("metadata") or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": False,
        "temperature": temperature,
        "text": {"format": fields.get("text", dict, {}).get("format") or {"type": "text"}},
        "tool_choice": fields.raw("tool_choice") or "auto",
        "tools": fields.raw("tools") or [],
        "top_p": top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _finished(base: dict[str, Any], items: list[Any], output: RequestOutput, made: int) -> dict[str, Any]:
    """Return the response of a finished answer; `made`: number of its tokens."""
    [sample] = output.outputs
    prompt = len(output.prompt_token_ids)
    usage = {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": output.num_cached_tokens},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + made,
    }
    return base | _status(sample) | {"output": items, "usage": usage}


def _status(sample: CompletionOutput) -> dict[str, Any]:
    if sample.finish_reason == "length":
        return {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    return {"status": "completed"}


def _complete(base: dict[str, Any], parser: Any, output: RequestOutput) -> dict[str, Any]:
    [sample] = output.outputs
    items = items_of(message_of(parser(output).push(sample.text, last=True)))
    return _finished(base, items, output, len(sample.token_ids))


async def _events(base: dict[str, Any], new: Any, streams: Sequence[OutputStream]) -> AsyncGenerator[bytes, None]:
    parser, items, number, made = None, Items(), 0, 0
    events = [{"type": "response.created", "response": base}, {"type": "response.in_progress", "response": base}]
    async for _, output in merged(streams):
        [sample] = output.outputs
        parser, made = parser or new(output), made + len(sample.token_ids)
        for delta in parser.push(sample.text, last=sample.finished):
            events += items.add(delta)
        if sample.finished:
            events += items.close()
            last = _finished(base, items.done, output, made)
            events.append({"type": f"response.{last['status']}", "response": last})
        for one in events:
            yield event(one | {"sequence_number": number}, one["type"])
            number += 1
        events = []
