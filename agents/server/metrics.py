"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from flexquant_rl.engine.control.draft_counts import DraftCounts

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
Outcome = Literal["done", "disconnected", "stopped", "failed"]
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The numbers of one server.

    Args:
        num_waiting: Says how many requests wait.
        num_running: Says how many run.
    """

    def __init__(self, num_waiting: Callable[[], int], num_running: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self.tokens = Counter("flexquant_tokens", "Tokens read and generated.", ["kind"], registry=registry)
        self.requests = Counter("flexquant_requests", "Requests that ended.", ["outcome"], registry=registry)
        self.refused = Counter("flexquant_refused", "Requests refused, by HTTP status.", ["status"], registry=registry)
        self.drafts = Counter(
            "flexquant_drafts",
            "Drafts proposed and accepted, of whole requests.",
            ["kind"],
            registry=registry,
        )
        self.first_token_s = Histogram(
            "flexquant_time_to_first_token_seconds",
            "From a request to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.between_tokens_s = Histogram(
            "flexquant_time_between_tokens_seconds",
            "Between two tokens of a request.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.bit_width = Summary(
            "flexquant_bit_width",
            "Mean width of the step behind each token; sum / count is the mean.",
            registry=registry,
        )
        for name, help_, count in (
            ("flexquant_queue_length", "Requests that wait for a slot.", num_waiting),
            ("flexquant_running", "Requests that run.", num_running),
        ):
            Gauge(name, help_, registry=registry).set_function(count)
        # Series exist from the start, so that rates begin at 0.
        for kind in ("prompt", "generated"):
            self.tokens.labels(kind)
        for kind in ("proposed", "accepted"):
            self.drafts.labels(kind)

    def count_drafts(self, counts: DraftCounts) -> None:
        """Adds what the drafts of a request came to."""
        self.drafts.labels("proposed").inc(sum(counts.drafted) + counts.num_found)
        self.drafts.labels("accepted").inc(sum(counts.accepted) + counts.num_found_accepted)

    def count_end(self, outcome: Outcome) -> None:
        """Counts a request that ended."""
        self.requests.labels(outcome).inc()

    def totals(self) -> dict[str, int]:
        """What the server has done since it started, for the last line of the command."""

        def total(counter: Counter, kind: str | None = None) -> int:
            samples = [sample for metric in counter.collect() for sample in metric.samples]
            counted = [sample for sample in samples if sample.name.endswith("_total")]
            return round(sum(sample.value for sample in counted if kind in (None, sample.labels.get("kind"))))

        return {
            "num_requests": total(self.requests),
            "num_refused": total(self.refused),
            "num_tokens": total(self.tokens, "generated"),
        }

    def text(self) -> bytes:
        """All numbers, in Prometheus' text format."""
        return bytes(generate_latest(self._registry))
