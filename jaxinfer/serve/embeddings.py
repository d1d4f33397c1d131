"""`POST /v1/embeddings`."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.llm_base.prefill import LAST_TOKEN, POOLINGS, embedding_of
from jaxinfer.outputs import RequestOutput
from jaxinfer.results.output_streams import OutputStream
from jaxinfer.serve.body import Fields, read_json
from jaxinfer.serve.completions import prompts_of
from jaxinfer.serve.context import of
from jaxinfer.serve.errors import APIError, about
from jaxinfer.serve.streaming import respond
from jaxinfer.serve.usage import Usage

KNOWN = ("model", "input", "encoding_format", "user", "pooling", "normalize")
"""Fields that are read; `user` is ignored, `pooling` and `normalize` are arguments of `LLM.embed`."""
FORMATS = (FLOAT, BASE64) = ("float", "base64")
MAX_INPUTS = 2048
"""Maximum number of inputs of a request, as in OpenAI's API."""


async def embeddings(request: Request) -> Response:
    """Return the embedding of one or several inputs."""
    context = of(request)
    fields = Fields(await read_json(request, context.config))
    fields.check_known(KNOWN, {})
    adapter = context.check_model(fields.get("model", str))
    prompts = [prompt | {"adapter": adapter} for prompt in prompts_of(fields.raw("input"), "input")]
    if len(prompts) > MAX_INPUTS:
        raise APIError(f"input has {len(prompts)} entries; send at most {MAX_INPUTS} a request.", param="input")
    shape = _choice(fields, "encoding_format", FORMATS, FLOAT)
    pooling, normalize = _choice(fields, "pooling", POOLINGS, LAST_TOKEN), fields.get("normalize", bool, True)
    streams: list[OutputStream] = []

    async def queue() -> list[OutputStream]:
        for index, prompt in enumerate(prompts):
            with about("input", index if len(prompts) > 1 else None):
                streams.append(await context.llm.add_embed(prompt, pooling))
        return streams

    def whole(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        vectors = [embedding_of(stream.handle.request, normalize=normalize).embedding for stream in streams]
        usage = Usage.of(outputs).as_json()
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _encoded(vector, shape)}
                for index, vector in enumerate(vectors)
            ],
            "model": adapter or context.config.model_name,
            "usage": {name: usage[name] for name in ("prompt_tokens", "total_tokens", "prompt_tokens_details")},
        }

    return await respond(request, queue, whole=whole)


def _choice(fields: Fields, name: str, values: Sequence[str], default: str) -> str:
    value = fields.get(name, str, default)
    if value not in values:
        raise APIError(f"{name} must be {' or '.join(map(repr, values))}, got {value[:40]!r}.", param=name)
    return value


def _encoded(vector: np.ndarray, shape: str) -> list[float] | str:
    """Return a vector as JSON: numbers, or the bytes of little-endian float32 in base64."""
    return vector.tolist() if shape == FLOAT else base64.b64encode(vector.astype("<f4").tobytes()).decode()
