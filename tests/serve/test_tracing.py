"""OpenTelemetry spans of requests. Needs opentelemetry-sdk; without it only the no-op is tested."""

import asyncio

import pytest
from support.stepping import Held, begun

from jaxinfer import AsyncLLM, RequestOutput, SamplingParams
from jaxinfer.results import tracing

pytestmark = pytest.mark.xdist_group("serve")
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def exporter():
    """Spans of this process; a provider can be set once a process."""
    pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    made, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(made))
    trace.set_tracer_provider(provider)
    return made


@pytest.fixture
def spans(exporter):
    exporter.clear()
    return exporter.get_finished_spans


def test_without_the_api_nothing_is_recorded(monkeypatch):
    monkeypatch.setattr(tracing, "trace", None)
    with tracing.within({"traceparent": PARENT}):
        span = tracing.Span("7", SamplingParams())
        assert span._span is None
        span.take(RequestOutput("7", None, [], [], True))
        span.fail("aborted")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_is_a_child_of_the_clients_span(url, spans, streamed):
    httpx = pytest.importorskip("httpx")
    asked = {"prompt": "hello cat", "max_tokens": 5, "ignore_eos": True, "stream": streamed, "temperature": 0.5}
    found = httpx.post(f"{url}/v1/completions", json=asked, headers={"traceparent": PARENT}, timeout=60)
    assert found.status_code == 200
    [span] = spans()
    assert span.name == "llm_request" and span.kind.name == "SERVER" and span.status.is_ok is not False
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1] and f"{span.parent.span_id:016x}" in PARENT
    values = dict(span.attributes)
    assert values["gen_ai.usage.completion_tokens"] == 5 and values["gen_ai.usage.prompt_tokens"] > 1
    assert (values["gen_ai.request.max_tokens"], values["gen_ai.request.temperature"]) == (5, 0.5)
    assert values["gen_ai.response.finish_reasons"] == ("length",)
    assert 0 <= values["gen_ai.latency.time_in_queue"] <= values["gen_ai.latency.time_to_first_token"]
    assert values["gen_ai.latency.time_to_first_token"] <= values["gen_ai.latency.e2e"]
    assert values["gen_ai.latency.e2e"] <= (span.end_time - span.start_time) / 1e9 + 5
    assert values["jaxinfer.cache_miss_reason"]


def test_an_aborted_request_ends_its_span_once(llm, spans):
    async def run():
        stream = await AsyncLLM.of(llm).add_request("hello", SamplingParams(max_tokens=40, ignore_eos=True))
        async for _ in stream:
            stream.close()
            stream.close()

    engine = llm._engine
    with Held(engine, lambda: begun(engine), until=lambda: not engine.requests):
        asyncio.run(run())
    [span] = spans()
    assert span.status.description == "aborted" and span.end_time >= span.start_time
