"""`GET /openapi.json`: the API as an OpenAPI 3.1 document, generated from the tables that check requests."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.llm_base.prefill import POOLINGS
from jaxinfer.sampling_params import MAX_LOGPROBS, MAX_REPETITION_PENALTY, MIN_REPETITION_PENALTY
from jaxinfer.serve import anthropic, audio, chat, completions, embeddings, models, responses, sampling
from jaxinfer.serve.context import Context, of
from jaxinfer.serve.errors import TYPES, Json

Schema = dict[str, Any]
STRING, BOOLEAN, OBJECT = {"type": "string"}, {"type": "boolean"}, {"type": "object"}
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
TEXTS = {"type": "array", "items": {"type": "string"}}
MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": STRING,
        "content": {"anyOf": [STRING, {"type": "array", "items": {"anyOf": [STRING, OBJECT]}}, {"type": "null"}]},
    },
}
FUNCTION = {"type": "object", "required": ["name"], "properties": {"name": STRING}}
TOOL = {
    "type": "object",
    "required": ["function"],
    "properties": {"type": {"const": "function"}, "function": FUNCTION},
}
FORMAT = {
    "type": "object",
    "required": ["type"],
    "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": OBJECT},
}
JSON, EVENTS = "application/json", "text/event-stream"


def _number(low: float | None = None, high: float | None = None, kind: str = "number", **more: float) -> Schema:
    limits = {"minimum": low, "maximum": high, **more}
    return {"type": kind} | {name: value for name, value in limits.items() if value is not None}


def _integer(low: int | None = None, high: int | None = None) -> Schema:
    return _number(low, high, "integer")


def _objects(*required: str) -> Schema:
    item = {"type": "object", "required": list(required)}
    return {"type": "array", "items": item}


def _choice(*values: Any) -> Schema:
    return {"enum": list(values)}


def fields(context: Context) -> dict[str, Schema]:
    """Return the schema of each field by its name, for endpoints without a schema of their own for it."""
    config, tokenizer = context.config, context.llm.get_tokenizer()
    tokens = _integer(1, config.max_tokens)
    return {
        "model": {"enum": context.models},
        "n": _integer(1, config.max_n),
        "stop": {"anyOf": [STRING | {"minLength": 1}, {"type": "array", "items": STRING | {"minLength": 1}}]},
        "seed": _integer(-(2**63), 2**63 - 1),
        "temperature": _number(0),
        "top_p": _number(high=1, exclusiveMinimum=0),
        "top_k": _integer(-1, 2**31 - 1),
        "min_p": _number(0, 1),
        "presence_penalty": _number(-2, 2),
        "frequency_penalty": _number(-2, 2),
        "repetition_penalty": _number(MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
        "logit_bias": {
            "type": "object",
            "patternProperties": {"^[0-9]{1,10}$": _number(-sampling.MAX_BIAS, sampling.MAX_BIAS)},
        },
        "max_tokens": tokens,
        "max_completion_tokens": tokens,
        "max_output_tokens": tokens,
        "min_tokens": _integer(0),
        "no_repeat_ngram_size": _integer(0),
        "stop_token_ids": IDS,
        "allowed_token_ids": IDS,
        "bad_words": TEXTS,
        "stop_sequences": TEXTS,
        "top_logprobs": _integer(0, min(20, MAX_LOGPROBS)),
        **dict.fromkeys(
            (
                "stream",
                "ignore_eos",
                "skip_special_tokens",
                "include_stop_str_in_output",
                "parallel_tool_calls",
                "add_generation_prompt",
                "continue_final_message",
            ),
            BOOLEAN,
        ),
        "stream_options": {
            "type": "object",
            "properties": {"include_usage": BOOLEAN, "include_obfuscation": BOOLEAN},
            "additionalProperties": False,
        },
        "messages": {"type": "array", "items": MESSAGE, "minItems": 1},
        "tools": {"type": "array", "items": TOOL},
        "tool_choice": {"anyOf": [_choice("none", "auto", "required"), OBJECT]},
        "response_format": FORMAT,
        "structured_outputs": OBJECT,
        "chat_template_kwargs": OBJECT,
        "reasoning_effort": STRING,
        "cache_salt": STRING,
        "prompt": {"anyOf": [STRING | {"minLength": 1}, IDS, TEXTS, {"type": "array", "items": IDS}]},
        "tokens": {"type": "array", "items": _integer(0, len(tokenizer) - 1 if tokenizer is not None else None)},
        "input": {"anyOf": [STRING, {"type": "array", "items": OBJECT}]},
        "instructions": STRING,
        "reasoning": OBJECT,
        "text": OBJECT,
        "system": {"anyOf": [STRING, _objects("type", "text")]},
        "output_config": OBJECT,
    }


OWN: Mapping[str, Mapping[str, Schema]] = {
    "/v1/completions": {"logprobs": _integer(0, 20), "parallel_tool_calls": {}},
    "/v1/chat/completions": {"logprobs": BOOLEAN},
    "/v1/responses": {"tools": _objects("type", "name")},
    "/v1/messages": {"tools": _objects("name", "input_schema"), "tool_choice": OBJECT},
    "/v1/messages/count_tokens": {"tools": _objects("name", "input_schema"), "tool_choice": OBJECT},
    "/tokenize": {"prompt": STRING},
    "/v1/embeddings": {
        "input": {"anyOf": [STRING | {"minLength": 1}, IDS, TEXTS, {"type": "array", "items": IDS}]},
        "encoding_format": _choice(*embeddings.FORMATS),
        "pooling": _choice(*POOLINGS),
        "normalize": BOOLEAN,
    },
}
"""Schemas of fields, by endpoint, that differ from those of the other endpoints."""
BODIES: Mapping[str, tuple[Sequence[str], Mapping[str, Any], Sequence[str], str]] = {
    "/v1/completions": (sorted(completions.KNOWN), completions.NEUTRAL, ("prompt",), "Continue prompts"),
    "/v1/chat/completions": (sorted(chat.KNOWN), chat.NEUTRAL, ("messages",), "Answer a conversation"),
    "/v1/responses": (sorted(responses.KNOWN), responses.NEUTRAL, ("input",), "Answer a conversation, statelessly"),
    "/v1/messages": (
        sorted(anthropic.KNOWN),
        anthropic.NEUTRAL,
        ("messages", "max_tokens"),
        "Answer a conversation in Anthropic's form",
    ),
    "/v1/messages/count_tokens": (
        [*anthropic.PROMPT, *anthropic.IGNORED],
        anthropic.NEUTRAL,
        ("messages",),
        "Count the tokens of a conversation",
    ),
    "/v1/embeddings": (sorted(embeddings.KNOWN), {}, ("input",), "Return the embeddings of texts"),
    "/tokenize": (["model", "prompt", "messages", *models.CHAT_OPTIONS], {}, (), "Return the token ids of a text"),
    "/detokenize": (["model", "tokens"], {}, ("tokens",), "Return the text of token ids"),
}
"""Fields, unsupported fields with the values that change nothing, required fields and summary of JSON bodies."""
STREAMED = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
"""Endpoints that answer with events where `stream` is true."""
READS: Mapping[str, tuple[str, str]] = {
    "/health": ("Return whether the engine can run steps", ""),
    "/metrics": ("Return metrics in Prometheus' format", "text/plain"),
    "/v1/models": ("List the model", JSON),
    "/v1/models/{name}": ("Describe the model", JSON),
    "/openapi.json": ("Return this document", JSON),
}
"""Summary and media type of each GET endpoint."""


def _nullable(schema: Schema) -> Schema:
    """Allow null, which is the same as a missing field."""
    return {"anyOf": [schema, {"type": "null"}]}


def body(context: Context, path: str) -> Schema:
    """Return the schema of an endpoint's JSON body: its fields and no others."""
    names, neutral, required, _ = BODIES[path]
    known = fields(context) | OWN.get(path, {})
    properties = {name: known.get(name, {}) for name in names}
    properties |= {name: {"enum": [*values, None]} for name, values in neutral.items()}
    properties = {name: one if name in required else _nullable(one) for name, one in properties.items()}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _answers(path: str, media: Sequence[str], statuses: Sequence[int]) -> dict[str, Any]:
    """Return the responses of an endpoint."""
    form = "AnthropicError" if path.startswith("/v1/messages") else "Error"
    error = {JSON: {"schema": {"$ref": f"#/components/schemas/{form}"}}}
    found: dict[str, Any] = {str(status): {"description": TYPES[status], "content": error} for status in statuses}
    found["200"] = {"description": "the answer", "content": {kind: {"schema": {}} for kind in media if kind}}
    return found


def _post(path: str, media: Mapping[str, Schema], answers: Sequence[str], summary: str) -> dict[str, Any]:
    statuses = (400, 401, 404, 408, 413, 429, 500, 503)
    content = {kind: {"schema": schema} for kind, schema in media.items()}
    made = {"summary": summary, "requestBody": {"required": True, "content": content}}
    return {"post": made | {"responses": _answers(path, answers, statuses)}}


def _form(context: Context) -> Schema:
    """Return the schema of the form of a transcription."""
    known = fields(context) | {"file": STRING | {"format": "binary"}, "language": STRING}
    known["response_format"] = _choice(*audio.FORMATS)
    properties = {name: known[name] for name in sorted(audio.KNOWN)}
    properties |= {name: {"enum": list(values)} for name, values in audio.NEUTRAL.items()}
    return {"type": "object", "properties": properties, "required": ["file"], "additionalProperties": False}


def document(context: Context) -> dict[str, Any]:
    """Return the OpenAPI document of a server."""
    paths: dict[str, Any] = {}
    for path, (_, _, _, summary) in BODIES.items():
        media = (JSON, EVENTS) if path in STREAMED else (JSON,)
        paths[path] = _post(path, {JSON: body(context, path)}, media, summary)
    for path, summary in (("transcriptions", "Transcribe speech"), ("translations", "Translate speech into English")):
        media, made = {"multipart/form-data": _form(context)}, f"/v1/audio/{path}"
        paths[made] = _post(made, media, (JSON, "text/plain"), summary)
    name = {"name": "name", "in": "path", "required": True, "schema": STRING}
    for path, (summary, media) in READS.items():
        get = {"summary": summary, "responses": _answers(path, (media,), (401, 404, 500, 503))}
        paths[path] = {"get": get | ({"parameters": [name]} if "{" in path else {})}
    error = {"type": "object", "required": ["message", "type"], "properties": {"message": STRING, "type": STRING}}
    wrapped = {"type": "object", "required": ["error"], "properties": {"error": error}}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "jaxinfer", "version": "1"},
        "paths": paths,
        "components": {"schemas": {"Error": wrapped, "AnthropicError": wrapped}},
    }
    if context.config.api_key is not None:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
        paths["/health"]["get"]["security"] = []
    return found


async def openapi(request: Request) -> Response:
    """Return the document."""
    return Json(document(of(request)))
