"""The Prometheus metrics of /metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from smolstack.generation.engine import Engine
from smolstack.generation.request import Request

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        registry.register(_Work(engine))
        self.requests = Counter(
            "smolstack_requests", "Responses, by status.", ["path", "status"], registry=registry
        )
        self.answers = Counter(
            "smolstack_answers", "Answers completed.", ["finish_reason"], registry=registry
        )
        self.abandoned = Counter(
            "smolstack_answers_abandoned",
            "Answers and embeddings ended by a disconnected client, a deadline or an error.",
            registry=registry,
        )
        self.first_token = Histogram(
            "smolstack_first_token_seconds",
            "Time from a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "smolstack_request_seconds",
            "Time from a request's arrival to its end.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._seconds, self._counted = 0.0, 0

    def count_response(self, path: str, status: int) -> None:
        """Count a response."""
        self.requests.labels(path, str(status)).inc()

    def count_complete(self, request: Request) -> None:
        """Count a complete answer, or the work on an embedding."""
        if request.answer is not None:
            self.answers.labels(request.answer.finish_reason).inc()
        self._seconds += request.elapsed.timings().total
        self._counted += 1

    @property
    def mean_seconds(self) -> float:
        """Mean seconds of work per answer or embedding so far; 1 before the first."""
        return self._seconds / self._counted if self._counted else 1.0

    def text(self) -> bytes:
        """Return the metrics in Prometheus' exposition format."""
        return generate_latest(self.registry)


class _Work(Collector):
    """The engine's gauges and counters, read when collected."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, core = self.engine, self.engine.core
        gauges = {
            "queued": ("Waiting answers.", engine.queued),
            "running": ("Running answers.", engine.running),
            "image_cache_bytes": (
                "Visual tokens in the image cache.",
                core.image_queue.cache.held_bytes,
            ),
            "prefix_cache_bytes": ("KV caches in the prefix cache.", core.prefix_cache.held_bytes),
            "kv_cache_bytes": ("KV caches of running answers.", core.scheduler.reserved_bytes),
            "kv_cache_budget_bytes": ("Memory limit of all KV caches.", core.scheduler.kv_budget),
        }
        counters = {
            "decode_steps": ("Decode steps.", core.decode_steps),
            "generated_tokens": ("Tokens generated.", core.generated_tokens),
            "prefill_tokens": ("Prompt tokens processed.", core.prefill_tokens),
            "reused_tokens": (
                "Prompt tokens reused from the prefix cache.",
                core.prefix_cache.reused_tokens,
            ),
            "tiles": ("Tiles encoded.", core.image_queue.tiles_done),
            "images": ("Images encoded.", core.image_queue.images_done),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"smolstack_{name}", text, value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"smolstack_{name}", text, value)
