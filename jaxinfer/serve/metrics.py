"""`GET /metrics`: the engine's metrics in Prometheus' text format."""

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.engine.metrics import COUNTERS, LOOKUPS, SUCCESS, Histogram
from jaxinfer.serve.context import Context, of

MODEL = "model_name"


class Collector:
    """Prometheus collector that reads the engine's metrics on each scrape."""

    def __init__(self, context: Context):
        self._context = context

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics, each with the model's name as a label."""
        families: dict[str, Metric] = {}
        for reading in self._context.llm.get_metrics():
            labels = dict(reading.labels)
            family = families.get(reading.name)
            if family is None:
                family = families[reading.name] = _family(reading.name, reading.value, [MODEL, *labels])
            values = [self._context.config.model_name, *labels.values()]
            if isinstance(reading.value, Histogram):
                bounds = [*map(str, reading.value.bounds), "+Inf"]
                counts = accumulate(reading.value.counts)
                family.add_metric(values, list(zip(bounds, counts, strict=True)), reading.value.total)
            else:
                family.add_metric(values, reading.value)
        yield from families.values()


def _family(name: str, value: float | Histogram, labels: list[str]) -> Metric:
    text = name.split(":", 1)[1].replace("_", " ")
    if isinstance(value, Histogram):
        return HistogramMetricFamily(name, text, labels=labels)
    kind = CounterMetricFamily if name.split(":", 1)[1] in (*COUNTERS, SUCCESS, LOOKUPS) else GaugeMetricFamily
    return kind(name, text, labels=labels)


def registry(context: Context) -> CollectorRegistry:
    """Return the registry of a server."""
    made = CollectorRegistry(auto_describe=False)
    made.register(Collector(context))
    return made


async def metrics(request: Request) -> Response:
    """Return the metrics."""
    of(request).llm.check_alive()
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)
