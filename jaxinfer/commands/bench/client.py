"""Stream completions from a server with OpenAI's API, and record when their tokens arrive."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Target:
    """Settings that all requests share."""

    model: str
    endpoint: str
    """"completions" or "chat"."""
    output_len: int
    """New tokens of a request."""
    ignore_eos: bool
    """Whether requests run to their length; the field is not OpenAI's."""

    @property
    def path(self) -> str:
        """Path of the endpoint."""
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"

    def body(self, prompt: str) -> dict[str, Any]:
        """Return the body of a request."""
        chat = {"messages": [{"role": "user", "content": prompt}]}
        asked = chat if self.endpoint == "chat" else {"prompt": prompt}
        asked |= {"model": self.model, "max_tokens": self.output_len, "temperature": 0, "stream": True}
        asked["stream_options"] = {"include_usage": True}
        return asked | ({"ignore_eos": True} if self.ignore_eos else {})


@dataclass
class Answer:
    """Times of one request in seconds, and its tokens."""

    first: float = 0.0
    """Time to the first token."""
    seconds: float = 0.0
    """Time to the last token."""
    gaps: list[float] = field(default_factory=list)
    """Times between events with text, each of which may hold several tokens."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    """By the server's usage; without one, the number of events with text."""
    error: str | None = None
    """Why the request failed; None if it was answered."""

    @property
    def per_token(self) -> float:
        """Mean time of a token after the first."""
        return (self.seconds - self.first) / (self.new_tokens - 1)


def make_client(base_url: str, key: str | None, timeout: float, connections: int) -> Any:
    """Return an HTTP client of a server.

    Raises:
        ValueError: httpx is missing, or the address is not an HTTP URL.
    """
    try:
        import httpx
    except ImportError as error:
        raise ValueError("bench serve needs httpx: pip install 'jaxinfer[bench]'") from error
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"--base-url must start with http:// or https://, got {base_url!r}")
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    # A proxy of the environment would be measured with the server.
    return httpx.AsyncClient(
        base_url=base_url.rstrip("/"), headers=headers, timeout=timeout, limits=limits, trust_env=False
    )


async def model_of(client: Any) -> str:
    """Return the name of a server's first model; raises RuntimeError if it cannot be read."""
    import httpx

    try:
        found = await client.get("/v1/models")
        found.raise_for_status()
        return found.json()["data"][0]["id"]
    except httpx.TransportError as error:
        raise RuntimeError(f"{client.base_url} cannot be reached: {error or type(error).__name__}") from error
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
        address = f"{str(client.base_url).rstrip('/')}/v1/models"
        raise RuntimeError(f"{address} names no model: {error or type(error).__name__}") from error


async def send(client: Any, target: Target, prompt: str) -> Answer:
    """Stream one answer; an error of the server or the connection becomes that of the answer."""
    import httpx

    answer, start, events = Answer(), time.perf_counter(), 0
    last = start
    try:
        async with client.stream("POST", target.path, json=target.body(prompt)) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                answer.error = f"status {response.status_code}: {' '.join(text.split())[:300]}"
                return answer
            async for event in _events(response):
                if "error" in event:
                    answer.error = f"{event['error']}"[:300]
                    return answer
                if usage := event.get("usage"):
                    answer.prompt_tokens, answer.new_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                if not _has_text(event):
                    continue
                now = time.perf_counter()
                if events:
                    answer.gaps.append(now - last)
                else:
                    answer.first = now - start
                last, events = now, events + 1
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        answer.error = f"{type(error).__name__}: {error}"
        return answer
    if not events and answer.new_tokens:  # tokens without text, such as special ones: known at the end of the stream
        last = time.perf_counter()
        answer.first = last - start
    elif not events:
        answer.error = "the stream had no tokens"
    answer.seconds, answer.new_tokens = last - start, answer.new_tokens or events
    return answer


async def _events(response: Any) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON of server-sent events, up to the end mark."""
    async for line in response.aiter_lines():
        if line.startswith("data:") and (text := line[5:].strip()) != "[DONE]":
            yield json.loads(text)


def _has_text(event: dict[str, Any]) -> bool:
    """Return whether an event brings tokens: those of an end token or a role alone have no text."""
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or choice
        if delta.get("text") or delta.get("content") or delta.get("reasoning_content"):
            return True
    return False
