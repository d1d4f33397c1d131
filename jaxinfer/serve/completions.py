"""`POST /v1/completions`."""

import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.outputs import CompletionOutput, RequestOutput
from jaxinfer.results.output_streams import OutputStream
from jaxinfer.serve import sampling, structure
from jaxinfer.serve.body import Fields, read_json
from jaxinfer.serve.context import new_id, of
from jaxinfer.serve.errors import APIError, about, wrong_type
from jaxinfer.serve.streaming import DONE, event, merged, respond
from jaxinfer.serve.usage import Usage, completion_logprobs, finish_reason

KNOWN = frozenset(
    {*sampling.COMMON, *sampling.EXTRA, *sampling.IGNORED, "prompt", "cache_salt", "response_format", structure.FIELD}
)
NEUTRAL: Mapping[str, Sequence[Any]] = {"best_of": [1], "echo": [False], "suffix": [""]}
"""Fields of OpenAI's API that are not supported, with the values that change nothing."""


async def completions(request: Request) -> Response:
    """Continue one or several prompts."""
    context = of(request)
    fields = Fields(await read_json(request, context.config))
    fields.check_known(KNOWN, NEUTRAL)
    adapter = context.check_model(fields.get("model", str))
    asked = structure.of_fields(fields)
    prompts, salt = prompts_of(fields.raw("prompt")), fields.get("cache_salt", str)
    logprobs, default = fields.within("logprobs", int, 0, 20), context.llm.default_params.max_tokens
    params = sampling.read(context, fields, prompts=len(prompts), logprobs=logprobs, default=default, structure=asked)
    usage = sampling.stream_usage(fields)
    base = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": adapter or context.config.model_name,
    }

    async def queue() -> list[OutputStream]:
        found = []
        for index, prompt in enumerate(prompts):
            given = prompt if salt is None else prompt | {"cache_salt": salt}
            structured = structure.named(structure.FIELD if asked is None else asked.field)
            with about("prompt", index if len(prompts) > 1 else None), structured:
                found.append(
                    await context.llm.add_request(given, params, request_id=f"{base['id']}-{index}", adapter=adapter)
                )
        return found

    return await respond(
        request,
        queue,
        streamed=fields.get("stream", bool, False),
        events=lambda streams: _events(base, params.n, logprobs or 0, usage, streams),
        whole=lambda outputs: _complete(base, params.n, logprobs or 0, outputs),
    )


def prompts_of(value: Any, name: str = "prompt") -> list[dict[str, Any]]:
    """Return the prompts in a request's field `name`: a text, token ids, or a list of either."""
    if value is None:
        raise APIError(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    if isinstance(value, str):
        return [{"prompt": value}]
    if not isinstance(value, list) or not value:
        raise wrong_type(name, "a string, token ids, or a list of these that is not empty", value)
    if isinstance(value[0], int):
        return [{"prompt_token_ids": value}]
    for index, one in enumerate(value):
        if not isinstance(one, str | list):
            raise wrong_type(name, f"a list of strings or of token ids (entry {index})", one)
    return [{"prompt": one} if isinstance(one, str) else {"prompt_token_ids": one} for one in value]


def _choice(sample: CompletionOutput, index: int, top: int, start: int = 0) -> dict[str, Any]:
    return {
        "index": index,
        "text": sample.text,
        "logprobs": completion_logprobs(sample, top, start),
        "finish_reason": finish_reason(sample),
        "stop_reason": sample.stop_reason,
    }


def _complete(base: dict[str, Any], n: int, top: int, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    choices = [
        _choice(sample, place * n + sample.index, top)
        for place, output in enumerate(outputs)
        for sample in output.outputs
    ]
    return base | {"choices": choices, "usage": Usage.of(outputs).as_json()}


async def _events(
    base: dict[str, Any], n: int, top: int, with_usage: bool, streams: Sequence[OutputStream]
) -> AsyncGenerator[bytes, None]:
    extra = {"usage": None} if with_usage else {}
    usage, seen, length = Usage(), set(), Counter()
    async for place, output in merged(streams):
        if place not in seen:
            seen.add(place)
            usage.add_prompt(output)
        usage.add(output)
        for sample in output.outputs:
            index = place * n + sample.index
            yield event(base | {"choices": [_choice(sample, index, top, length[index])]} | extra)
            length[index] += len(sample.text)
    if with_usage:
        yield event(base | {"choices": [], "usage": usage.as_json()})
    yield DONE
