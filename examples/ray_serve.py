"""Serve a model from several replicas with Ray Serve, and send requests to the replica that has their prefix cached.

    python examples/ray_serve.py --model DIR --replicas 2 --port 8000

Each replica is an engine in a process of its own with the whole API of `jaxinfer serve`. The router remembers which
replica got which beginnings of prompts; a request goes to the one that got the longest beginning it shares, unless that
one has many more requests than another. Where a replica dies, Ray starts another, and requests that had no answer yet
are sent to those that are left. A stream that has begun ends with an error as its last event.
"""

import argparse
import asyncio
import hashlib
import json
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

PIECE = 64
"""Characters of a prompt that the router compares at a time, about a block of the cache."""
REMEMBERED = 200_000
"""Pieces that the router remembers; those that were not seen for longest are forgotten."""
RETRIES = 5
"""Times that a request is sent again because its replica died."""
HOP_HEADERS = ("connection", "content-length", "host", "transfer-encoding")
"""Headers that belong to one connection and are not passed on."""


@dataclass(frozen=True)
class Call:
    """An HTTP request as the replicas get it."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    prefix: str
    """What the prompt begins with, by which the router chooses; empty for requests without a prompt."""


def prefix_of(body: bytes) -> str:
    """Return the text that decides what a request can find in the prefix cache; empty if there is none."""
    try:
        found = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(found, dict):
        return ""
    # In the order of the prompt: a salt separates everything, templates render tools and system text first.
    names = ("cache_salt", "tools", "instructions", "system", "messages", "prompt", "input")
    parts = [found[name] for name in names if found.get(name) is not None]
    return "".join(part if isinstance(part, str) else json.dumps(part) for part in parts)


class Prefixes:
    """Beginnings of prompts and the replica that got each last.

    Args:
        most: number of pieces to remember.
    """

    def __init__(self, most: int = REMEMBERED):
        self._most = most
        self._owners: OrderedDict[bytes, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owners)

    @staticmethod
    def _pieces(text: str) -> Iterator[bytes]:
        """Yield a digest for each whole piece, of it and everything before it."""
        digest = hashlib.sha256()
        for start in range(0, len(text) - PIECE + 1, PIECE):
            digest.update(text[start : start + PIECE].encode("utf-8", "surrogatepass"))
            yield digest.digest()

    def add(self, text: str, replica: Any) -> None:
        """Note that a replica gets this prompt."""
        for piece in self._pieces(text):
            self._owners[piece] = replica
            self._owners.move_to_end(piece)
        while len(self._owners) > self._most:
            self._owners.popitem(last=False)

    def find(self, text: str, replicas: Sequence[Any]) -> Any | None:
        """Return which of these replicas got the longest beginning of a prompt; None if none got any."""
        best = None
        for piece in self._pieces(text):
            if piece not in self._owners:
                break
            if self._owners[piece] in replicas:
                best = self._owners[piece]
        return best

    def counts(self) -> Mapping[Any, int]:
        """Return how many pieces each replica has."""
        return Counter(self._owners.values())


class PrefixRouter(RequestRouter):
    """Router of Ray Serve that prefers the replica which has a request's prefix.

    Ray's `PrefixCacheAffinityRouter` does the like, but cannot be imported without vLLM or SGLang.
    """

    def initialize_state(self, imbalance: int = 16) -> None:
        """Begin without any prefix. `imbalance`: requests more than another's that a replica may have."""
        self._prefixes, self._imbalance = Prefixes(), imbalance

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank the replicas for a request; the first that accepts it gets it."""
        load = {one.replica_id: self.replica_queue_len_cache.get(one.replica_id) or 0 for one in candidate_replicas}
        held = self._prefixes.counts() if len(candidate_replicas) > 1 else {}
        ranked = sorted(candidate_replicas, key=lambda one: (load[one.replica_id], held.get(one.replica_id, 0)))
        found = self._prefixes.find(_prefix(pending_request), list(load))
        if found is not None and load[found] - min(load.values()) <= self._imbalance:
            ranked.sort(key=lambda one: one.replica_id != found)
        return [[one] for one in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        """Note which replica got a prompt."""
        self._prefixes.add(_prefix(pending_request), replica_id)


def _prefix(pending: PendingRequest | None) -> str:
    # Ray sends the classes of this module by value, each time another `Call`, so isinstance would not find it.
    return getattr(pending.args[0], "prefix", "") if pending is not None and pending.args else ""


class Replica:
    """An engine and its API in an actor of its own.

    Args:
        model: a checkpoint's directory or Hub id.
        name: name of the model in requests.
        settings: arguments of `LLM`.
    """

    def __init__(self, model: str, name: str, settings: dict[str, Any]):
        from jaxinfer import LLM, AsyncLLM
        from jaxinfer.serve.app import create_app
        from jaxinfer.serve.config import ServerConfig

        self._llm = AsyncLLM.of(LLM(model, **settings))
        self._app = create_app(self._llm, ServerConfig(name))
        self._id = serve.get_replica_context().replica_id.unique_id

    def check_health(self) -> None:
        """Tell Ray Serve, which asks now and then, whether the engine can run steps."""
        self._llm.check_alive()

    async def answer(self, call: Call) -> AsyncIterator[Any]:
        """Run the application (ASGI) and yield the status and headers, then parts of the body."""
        scope = {"type": "http", "http_version": "1.1", "method": call.method, "path": call.path, "scheme": "http"}
        scope |= {
            "query_string": call.query,
            "headers": list(call.headers),
            "root_path": "",
            "asgi": {"version": "3.0"},
        }
        parts: asyncio.Queue = asyncio.Queue(maxsize=16)
        given, gone = iter([{"type": "http.request", "body": call.body, "more_body": False}]), asyncio.Event()

        async def receive() -> dict[str, Any]:
            if (request := next(given, None)) is not None:
                return request
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(scope, receive, parts.put)
            finally:
                await parts.put(None)

        task = asyncio.ensure_future(run())
        try:
            while (part := await parts.get()) is not None:
                if part["type"] == "http.response.start":
                    yield part["status"], [*part["headers"], (b"x-jaxinfer-replica", self._id.encode())]
                elif part.get("body"):
                    yield part["body"]
            await task
        finally:
            gone.set()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


class Ingress:
    """Pass HTTP requests on to the replicas, again where one dies before it has answered.

    Args:
        replicas: handle of the deployment of `Replica`.
    """

    def __init__(self, replicas: Any):
        self._replicas = replicas.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        body = await request.body()
        headers = tuple((name, value) for name, value in request.headers.raw if name.decode() not in HOP_HEADERS)
        call = Call(request.method, request.url.path, request.url.query.encode(), headers, body, prefix_of(body))
        for tries in range(RETRIES + 1):
            answer = self._replicas.answer.remote(call)
            try:
                status, headers = await anext(answer)
                if (b"content-type", b"text/event-stream") in [(name, value[:17]) for name, value in headers]:
                    return _response(StreamingResponse(_passed(answer), status), headers)
                return _response(Response(b"".join([part async for part in answer]), status), headers)
            except RayActorError:
                await asyncio.sleep(0.2 * 2**tries)
        error = {"message": "replicas died while they answered: try again", "type": "server_error", "code": None}
        return JSONResponse({"error": {**error, "param": None}}, status_code=503)


def _response(response: Response, headers: Sequence[tuple[bytes, bytes]]) -> Response:
    """Return a response with a replica's headers."""
    kept = [(name, value) for name, value in headers if name.decode() not in HOP_HEADERS]
    sizes = [(name, value) for name, value in response.raw_headers if name == b"content-length"]
    response.raw_headers = [*kept, *sizes]
    return response


async def _passed(answer: Any) -> AsyncIterator[bytes]:
    """Yield the events of a stream; one whose replica dies ends with an error."""
    try:
        async for part in answer:
            yield part
    except RayActorError:
        error = {"message": "the replica died while it answered: try again", "type": "server_error"}
        yield f"data: {json.dumps({'error': error})}\n\n".encode()
    finally:
        answer.cancel()  # ends the request in the engine where the client is gone; else nothing


def build(model: str, name: str, settings: dict[str, Any], *, replicas: int, cpus: float, imbalance: int) -> Any:
    """Return the application of Ray Serve.

    Args:
        model: a checkpoint's directory or Hub id.
        name: name of the model in requests.
        settings: arguments of `LLM`.
        replicas: number of engines.
        cpus: CPUs that Ray reserves for each; for GPUs see `ray_actor_options` of Ray Serve.
        imbalance: requests more than another's that a replica may have before prefixes count no more.
    """
    router = RequestRouterConfig(request_router_class=PrefixRouter, request_router_kwargs={"imbalance": imbalance})
    engines = serve.deployment(Replica).options(
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=1024,
        health_check_period_s=2,
        request_router_config=router,
    )
    # One ingress, whose handle has the one router that knows where prefixes are.
    ingress = serve.deployment(Ingress).options(max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0})
    return ingress.bind(engines.bind(model, name, settings))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Serve a model from several replicas with Ray Serve.")
    parser.add_argument("--model", required=True, help="a checkpoint's directory or Hub id")
    parser.add_argument("--served-model-name", help="name in requests; by default MODEL as given")
    parser.add_argument("--replicas", type=int, default=2, help="engines, each in a process of its own")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs that Ray reserves for a replica")
    parser.add_argument("--imbalance", type=int, default=16, help="requests that a replica may have more than another")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--settings", default="{}", help="arguments of LLM as JSON")
    args = parser.parse_args(argv)
    try:
        settings = json.loads(args.settings)
    except ValueError as error:
        print(f"error: --settings is no JSON: {error}", file=sys.stderr)
        return 2
    name = args.served_model_name or args.model
    app = build(args.model, name, settings, replicas=args.replicas, cpus=args.cpus, imbalance=args.imbalance)
    serve.start(http_options={"host": args.host, "port": args.port})
    try:
        serve.run(app)
        print(f"serving {name} at http://{args.host}:{args.port}", file=sys.stderr)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return 0
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        serve.shutdown()


if __name__ == "__main__":
    sys.exit(main())
