"""A server in this process, on a port of its own, over a tiny checkpoint."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from faults.conftest import SETTINGS, assert_idle
from support import checkpoint
from support.stepping import PATIENCE

from jaxinfer import LLM, AsyncLLM, SamplingParams

MODEL = "tiny"
CHAT = [{"role": "user", "content": "hello cat"}]


@pytest.fixture(scope="session", autouse=True)
def _patient() -> Iterator[None]:
    """Let httpx wait longer than its 5 seconds, within which a busy machine may not compile a step."""
    httpx = pytest.importorskip("httpx")
    limits = inspect.signature(httpx.get).parameters["timeout"].default  # the same object in all of its functions
    with pytest.MonkeyPatch.context() as patch:
        for name in limits.as_dict():
            patch.setattr(limits, name, PATIENCE)
        yield


@pytest.fixture(scope="session")
def llm(tmp_path_factory) -> Iterator[LLM]:
    folder = checkpoint.write(tmp_path_factory.mktemp("tiny"), scale=4.0)
    with LLM(folder, **SETTINGS, max_adapters=1, max_adapter_rank=2) as made:
        made.generate("hello", SamplingParams(max_tokens=2), use_tqdm=False)  # compiled before a client waits
        yield made


@contextmanager
def serving(llm: LLM, **settings: Any) -> Iterator[str]:
    """Serve a model on a thread; the value is the address."""
    import uvicorn

    from jaxinfer.serve.app import create_app
    from jaxinfer.serve.config import ServerConfig
    from jaxinfer.serve.connection import protocol

    config = ServerConfig(MODEL, **settings)
    app, http = create_app(AsyncLLM.of(llm), config), protocol(config.body_timeout)
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=http, log_level="error", timeout_graceful_shutdown=2))
    started = threading.Event()

    async def run() -> None:
        task = asyncio.ensure_future(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.005)
        started.set()
        await task

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert started.wait(30) and server.started
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert_idle(llm)


@pytest.fixture(scope="session")
def make_server(llm) -> Callable[..., Any]:
    """`with make_server(max_n=2) as url: ...`: a server of its own over the same engine."""
    return lambda **settings: serving(llm, **settings)


@pytest.fixture(scope="session")
def url(llm) -> Iterator[str]:
    with serving(llm) as address:
        yield address


@pytest.fixture
def client(url) -> Iterator[Any]:
    """OpenAI's client of the server; after the test, nothing is running."""
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made
