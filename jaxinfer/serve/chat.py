"""`POST /v1/chat/completions`."""

import dataclasses
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.outputs import CompletionOutput, RequestOutput
from jaxinfer.results.output_streams import OutputStream
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.serve import sampling, structure
from jaxinfer.serve.body import Fields, read_json
from jaxinfer.serve.context import Context, new_id, of
from jaxinfer.serve.errors import APIError, about, wrong_type
from jaxinfer.serve.parsing import AnswerParser, has_template, message_of
from jaxinfer.serve.streaming import DONE, event, merged, respond
from jaxinfer.serve.structure import FIELD, CallParser, Structure, named
from jaxinfer.serve.usage import Usage, chat_logprobs, finish_reason, first_of

TEMPLATE = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")
"""Fields, not OpenAI's, that are arguments of `LLM.chat`."""
KNOWN = frozenset(
    {
        *sampling.COMMON,
        *sampling.EXTRA,
        *sampling.IGNORED,
        *TEMPLATE,
        "messages",
        "top_logprobs",
        "max_completion_tokens",
        "tools",
        "tool_choice",
        "response_format",
        structure.FIELD,
        "reasoning_effort",
    }
)
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "modalities": [["text"]],
    "audio": [],
    "prediction": [],
    "web_search_options": [],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "verbosity": [],
    "moderation": [],
}
"""Fields of OpenAI's API that are not supported, with the values that change nothing."""


@dataclass(frozen=True)
class ChatCall:
    """A checked chat request."""

    messages: list[Any]
    params: SamplingParams
    options: dict[str, Any]
    """Arguments of `AsyncLLM.add_chat`."""
    top_logprobs: int = 0
    streamed: bool = False
    usage: bool = False
    """Whether the stream ends with a chunk of usage."""
    structure: Structure | None = None
    """Structure of the answer; None if it is free."""
    field: str = "messages"
    """Field of the request with the messages, for errors."""
    before: int = 0
    """Number of messages that come from other fields, before those of `field`."""

    @property
    def tools(self) -> Sequence[Any] | None:
        """Tools that the model may call."""
        return self.options.get("tools")

    def model(self, context: Context) -> str:
        """Return the name of the model or adapter that answers."""
        return self.options.get("adapter") or context.config.model_name

    def parser(self, context: Context, prompt: str | None) -> AnswerParser | CallParser:
        """Return the parser of a sample; an answer with a structure is content or tool calls as a whole."""
        if self.structure is None:
            return AnswerParser(context.llm.get_tokenizer(), prompt, self.tools)
        if self.structure.calls or self.structure.call is not None:
            return CallParser(self.structure)
        return AnswerParser(None, prompt, None)


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    context = of(request)
    call = read_call(context, Fields(await read_json(request, context.config)))
    base = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": call.model(context)}

    async def queue() -> list[OutputStream]:
        return [await add(context, call, base["id"])]

    return await respond(
        request,
        queue,
        streamed=call.streamed,
        events=lambda streams: _events(context, call, base, streams),
        whole=lambda outputs: _complete(context, call, base, first_of(outputs)),
    )


async def add(context: Context, call: ChatCall, request_id: str) -> OutputStream:
    """Queue a chat request."""
    structured = named(FIELD if call.structure is None else call.structure.field)
    with about(call.field, before=call.before), structured:
        return await context.llm.add_chat(call.messages, call.params, request_id=request_id, **call.options)


def read_call(context: Context, fields: Fields) -> ChatCall:
    """Check the body of a chat request."""
    fields.check_known(KNOWN, NEUTRAL)
    adapter = context.check_model(fields.get("model", str))
    messages = fields.need("messages", list)
    wanted, top = fields.get("logprobs", bool, False), fields.within("top_logprobs", int, 0, 20)
    if top is not None and not wanted:
        raise APIError("top_logprobs needs logprobs=true.", param="top_logprobs")
    limit = "max_tokens" if fields.raw("max_completion_tokens") is None else "max_completion_tokens"
    tools = tools_of(fields)
    if fields.raw("tool_choice") == "none":
        tools = None
    shape = _structure(fields, tools)
    logprobs = (top or 0) if wanted else None
    params = sampling.read(context, fields, logprobs=logprobs, limit=limit, structure=shape)
    options = {name: fields.raw(name) for name in TEMPLATE if fields.raw(name) is not None}
    effort = fields.get("reasoning_effort", str)
    if effort is not None:
        variables = fields.get("chat_template_kwargs", dict, {})
        options["chat_template_kwargs"] = {"reasoning_effort": effort} | variables
    if tools is not None:
        options["tools"] = tools
    options["adapter"] = adapter
    params = visible(context, params)
    streamed = fields.get("stream", bool, False)
    return ChatCall(messages, params, options, top or 0, streamed, sampling.stream_usage(fields), shape)


def _structure(fields: Fields, tools: Sequence[Any] | None) -> Structure | None:
    """Return the structure of an answer: tool calls that it must make, else that of its format."""
    parallel = fields.get("parallel_tool_calls", bool, True)
    calls = structure.of_choice(fields.raw("tool_choice"), tools, parallel=parallel)
    return structure.of_fields(fields) if calls is None else calls


def visible(context: Context, params: SamplingParams) -> SamplingParams:
    """Return parameters with special tokens in the text if a response template parses it: it may name them."""
    if params.structured_outputs is not None:
        return params
    if has_template(context.llm.get_tokenizer()):
        return dataclasses.replace(params, skip_special_tokens=False)
    return params


def tools_of(fields: Fields) -> list[Any] | None:
    """Return the checked tools of a request in OpenAI's form; None if there are none."""
    tools = fields.get("tools", list)
    for index, tool in enumerate(tools or ()):
        is_function = isinstance(tool, dict) and tool.get("type", "function") == "function"
        function = tool.get("function") if is_function else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            expected = "an object with type 'function' and a function with a name"
            raise wrong_type(f"tools[{index}]", expected, tool)
    # Templates may read the type, which clients of other servers leave out.
    return [{"type": "function", **tool} for tool in tools or ()] or None


def _complete(context: Context, call: ChatCall, base: dict[str, Any], output: RequestOutput) -> dict[str, Any]:
    choices = []
    for sample in output.outputs:
        parser = call.parser(context, output.prompt)
        message = message_of(parser.push(sample.text, last=True))
        choices.append(
            {
                "index": sample.index,
                "message": message,
                "logprobs": chat_logprobs(sample, call.top_logprobs),
                "finish_reason": finish_reason(sample, calls=parser.calls > 0),
                "stop_reason": sample.stop_reason,
            }
        )
    return base | {"object": "chat.completion", "choices": choices, "usage": Usage.of([output]).as_json()}


async def _events(
    context: Context, call: ChatCall, base: dict[str, Any], streams: Sequence[OutputStream]
) -> AsyncGenerator[bytes, None]:
    base = base | {"object": "chat.completion.chunk"}
    extra = {"usage": None} if call.usage else {}
    usage, parsers = Usage(), {}
    async for _, output in merged(streams):
        if not parsers:
            usage.add_prompt(output)
        usage.add(output)
        for sample in output.outputs:
            parser = parsers.get(sample.index)
            if parser is None:
                parser = call.parser(context, output.prompt)
                parsers[sample.index] = parser
                first = _choice(sample.index, {"role": "assistant", "content": ""})
                yield event(base | {"choices": [first]} | extra)
            for choice in _choices(call, parser, sample):
                yield event(base | {"choices": [choice]} | extra)
    if call.usage:
        yield event(base | {"choices": [], "usage": usage.as_json()})
    yield DONE


def _choice(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | more


def _choices(call: ChatCall, parser: AnswerParser | CallParser, sample: CompletionOutput) -> list[dict[str, Any]]:
    """Return the choices of a delta: its parts, the first with the log-probabilities, then the finish reason."""
    deltas = parser.push(sample.text, last=sample.finished)
    logprobs = chat_logprobs(sample, call.top_logprobs)
    if logprobs is not None and not deltas:
        deltas = [{"content": ""}]
    found = [_choice(sample.index, delta) for delta in deltas]
    if found:
        found[0]["logprobs"] = logprobs
    if sample.finished:
        reason = finish_reason(sample, calls=parser.calls > 0)
        found.append(_choice(sample.index, {}, finish_reason=reason, stop_reason=sample.stop_reason))
    return found
