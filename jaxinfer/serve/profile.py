"""`POST /start_profile` and `POST /stop_profile`: traces of JAX's profiler (`ServerConfig.profile_dir`)."""

import asyncio

import jax
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.serve.context import of
from jaxinfer.serve.errors import APIError, Json


async def start(request: Request) -> Response:
    """Start a trace of all that this process and its devices do."""
    context = of(request)
    if context.profiling:
        raise APIError("a trace runs already: POST /stop_profile ends it", status=409)
    context.profiling = True
    try:
        jax.profiler.start_trace(context.config.profile_dir)
    except Exception as error:
        context.profiling = False
        raise APIError(f"JAX's profiler did not start: {error}", status=409) from error
    return Json({"directory": context.config.profile_dir})


async def stop(request: Request) -> Response:
    """End the trace and write it."""
    context = of(request)
    if not context.profiling:
        raise APIError("no trace runs: POST /start_profile starts one", status=409)
    context.profiling = False
    await asyncio.to_thread(jax.profiler.stop_trace)
    return Json({"directory": context.config.profile_dir})


def end(app: Starlette) -> None:
    """Write the trace that runs when the server stops, if one does."""
    if app.state.context.profiling:
        app.state.context.profiling = False
        jax.profiler.stop_trace()
