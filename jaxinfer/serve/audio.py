"""`POST /v1/audio/transcriptions` and `/v1/audio/translations`: speech to text, of WAV files."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from jaxinfer.media.audio import read_wav
from jaxinfer.models.whisper.transcription import Segment, Transcript
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.serve.body import read_bytes
from jaxinfer.serve.context import Context, of
from jaxinfer.serve.errors import APIError, Json
from jaxinfer.serve.streaming import while_connected

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
"""Values of `response_format`."""
KNOWN = frozenset({"file", "model", "language", "response_format", "temperature", "seed", "max_tokens"})
NEUTRAL: Mapping[str, tuple[str, ...]] = {
    "prompt": ("",),
    "stream": ("", "false"),
    "timestamp_granularities[]": ("segment",),
    "chunking_strategy": ("auto",),
}
"""Fields of OpenAI's API that are not supported, with the values that change nothing."""


async def transcriptions(request: Request) -> Response:
    """Transcribe an audio file in its language."""
    return await _respond(request, "transcribe")


async def translations(request: Request) -> Response:
    """Translate the speech of an audio file into English text."""
    return await _respond(request, "translate")


async def _respond(request: Request, task: str) -> Response:
    context = of(request)
    form = await _form(request, context)
    _check_fields(form)
    context.check_model(form.get("model"))
    shape = form.get("response_format", "json")
    if shape not in FORMATS:
        raise APIError(
            f"response_format must be one of {', '.join(FORMATS)}, got {str(shape)[:100]!r}.", param="response_format"
        )
    params = SamplingParams(
        temperature=_number(form, "temperature", float, 0.0),
        seed=_number(form, "seed", int),
        max_tokens=_number(form, "max_tokens", int),
    )
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise APIError("file must be a WAV file, sent as a part of the form with a file name.", param="file")
    name = f"file {file.filename[:100]!r}" if file.filename else "file"
    options = {"language": form.get("language") or None, "task": task}

    async def transcribe() -> Transcript:
        audio = await context.llm.run_on_thread(read_wav, await file.read(), name)
        return await context.llm.transcribe(audio, params, **options)

    leave = context.enter()
    try:
        return _response(await while_connected(request, transcribe()), shape, task)
    finally:
        leave()


async def _form(request: Request, context: Context) -> FormData:
    """Read a multipart form within the limits of a body."""
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise APIError(
            f"content-type must be multipart/form-data, with the audio as the part 'file', got {kind[:100]!r}."
        )
    data = await read_bytes(request, context.config)

    async def stream() -> AsyncIterator[bytes]:
        yield data
        yield b""

    try:
        return await MultiPartParser(request.headers, stream(), max_files=1, max_fields=32).parse()
    except (MultiPartException, KeyError) as error:
        reason = getattr(error, "message", "the boundary is missing")
        raise APIError(f"the request body is not a valid multipart form: {reason}") from None


def _check_fields(form: FormData) -> None:
    for name, value in form.multi_items():
        if name in KNOWN:
            continue
        if name not in NEUTRAL:
            raise APIError(
                f"Unrecognized request argument supplied: {name[:100]}", param=name[:100], code="unknown_parameter"
            )
        if not isinstance(value, str) or value.lower() not in NEUTRAL[name]:
            raise APIError(
                f"{name} is not supported by this server, got {str(value)[:100]!r}; leave it out",
                param=name,
                code="unsupported_parameter",
            )


def _number(form: FormData, name: str, kind: type[int] | type[float], default: float | None = None) -> Any:
    """Return a field as a number; raises APIError if it is none."""
    value = form.get(name)
    if value is None or value == "":
        return default
    try:
        return kind(value)
    except (TypeError, ValueError):
        what = "an integer" if kind is int else "a number"
        raise APIError(f"{name} must be {what}, got {str(value)[:100]!r}.", param=name) from None


def _response(found: Transcript, shape: str, task: str) -> Response:
    if found.finish_reason == "error":
        raise APIError("the transcription ended because of an error; the log of the server has the reason", status=500)
    if shape == "json":
        return Json({"text": found.text.strip(), "usage": {"type": "duration", "seconds": round(found.duration)}})
    if shape == "text":
        return PlainTextResponse(found.text.strip() + "\n")
    if shape == "verbose_json":
        return Json(
            {
                "task": task,
                "language": found.language,
                "duration": found.duration,
                "text": found.text.strip(),
                "segments": [_segment(index, segment) for index, segment in enumerate(found.segments)],
            }
        )
    lines = ["WEBVTT", ""] if shape == "vtt" else []
    for index, segment in enumerate(found.segments, 1):
        lines += [str(index)] if shape == "srt" else []
        lines += [f"{_time(segment.start, shape)} --> {_time(segment.end, shape)}", segment.text.strip(), ""]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/vtt" if shape == "vtt" else "text/plain")


def _segment(index: int, segment: Segment) -> dict[str, Any]:
    return {
        "id": index,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": list(segment.token_ids),
    }


def _time(seconds: float, shape: str) -> str:
    """Format a time as SubRip (`srt`) or WebVTT (`vtt`) does."""
    whole = round(seconds * 1000)
    minutes, thousandths = divmod(whole, 60_000)
    point = "," if shape == "srt" else "."
    return f"{minutes // 60:02}:{minutes % 60:02}:{thousandths // 1000:02}{point}{thousandths % 1000:03}"
