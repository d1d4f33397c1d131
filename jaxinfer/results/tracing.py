"""OpenTelemetry spans of requests. Only the API is used: without an SDK in the process, no span is recorded.

The names are those of vLLM's spans, most of which are OpenTelemetry's conventions for generative models.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from jaxinfer.outputs import RequestMetrics, RequestOutput
from jaxinfer.sampling_params import SamplingParams

try:
    from opentelemetry import context, propagate, trace
except ImportError:
    trace = None

NAME = "llm_request"
"""Name of a span."""


def within(headers: Mapping[str, str]) -> AbstractContextManager[None]:
    """Make the spans of a block children of the span that HTTP headers name (`traceparent`)."""
    return nullcontext() if trace is None else _attached(headers)


@contextmanager
def _attached(headers: Mapping[str, str]) -> Iterator[None]:
    token = context.attach(propagate.extract(headers))
    try:
        yield
    finally:
        context.detach(token)


def _begin(request_id: str, params: SamplingParams) -> Any:
    """Begin a span; None if it would not be recorded."""
    if trace is None:
        return None
    asked = {
        "gen_ai.request.id": request_id,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.n": params.n,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.system": "jaxinfer",
    }
    given = {name: value for name, value in asked.items() if value is not None}
    span = trace.get_tracer("jaxinfer").start_span(NAME, kind=trace.SpanKind.SERVER, attributes=given)
    return span if span.is_recording() else None


class Span:
    """The span of a request, from its queueing to its last output.

    Args:
        request_id: id of the request.
        params: its sampling parameters.
    """

    def __init__(self, request_id: str, params: SamplingParams):
        self._span = _begin(request_id, params)
        self._made: dict[int, int] = {}
        self._whole = params.output_kind.name != "DELTA"

    def take(self, output: RequestOutput) -> None:
        """Count the tokens of an output, and end the span with the last one."""
        if self._span is None:
            return
        for sample in output.outputs:
            before = 0 if self._whole else self._made.get(sample.index, 0)
            self._made[sample.index] = before + len(sample.token_ids)
        if output.finished:
            reasons = [sample.finish_reason or "" for sample in output.outputs]
            self._span.set_attributes(_usage(output, sum(self._made.values()), reasons))
            if output.metrics is not None:
                self._span.set_attributes(_latencies(output.metrics))
            if "error" in reasons:
                self._span.set_status(trace.StatusCode.ERROR, str(output.outputs[reasons.index("error")].stop_reason))
            self._end()

    def fail(self, reason: str) -> None:
        """End the span of a request that was aborted or failed; does nothing if it has ended."""
        if self._span is not None:
            self._span.set_status(trace.StatusCode.ERROR, reason)
            self._end()

    def _end(self) -> None:
        span, self._span = self._span, None
        span.end(time.time_ns())


def _usage(output: RequestOutput, made: int, reasons: list[str]) -> dict[str, Any]:
    return {
        "gen_ai.usage.prompt_tokens": len(output.prompt_token_ids),
        "gen_ai.usage.completion_tokens": made,
        "gen_ai.usage.cached_tokens": output.num_cached_tokens,
        "gen_ai.usage.num_sequences": len(output.outputs),
        "gen_ai.response.finish_reasons": reasons,
    }


def _latencies(metrics: RequestMetrics) -> dict[str, Any]:
    """Return the latencies of a request in seconds, and why no more of its prompt was found in the prefix cache."""
    marks = metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time
    arrival, scheduled, first, end = marks
    found: dict[str, Any] = {"jaxinfer.num_preemptions": metrics.num_preemptions}
    if metrics.cache_miss_reason is not None:
        found["jaxinfer.cache_miss_reason"] = metrics.cache_miss_reason
    if scheduled is not None:
        found["gen_ai.latency.time_in_queue"] = scheduled - arrival
    if first is not None:
        found["gen_ai.latency.time_to_first_token"] = first - arrival
    if end is not None:
        found["gen_ai.latency.e2e"] = end - arrival
    if scheduled is not None and first is not None and end is not None:
        found["gen_ai.latency.time_in_model_prefill"] = first - scheduled
        found["gen_ai.latency.time_in_model_decode"] = end - first
        found["gen_ai.latency.time_in_model_inference"] = end - scheduled
    return found
