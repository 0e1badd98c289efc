"""What a server tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters of one application, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        names = ["form", "status"]  # form: question, locate, box; none where a request did not come so far
        self._requests = Counter("locvlm_requests", "Requests to /api/answer", names, registry=self._registry)
        self._seconds = Histogram(
            "locvlm_request_seconds", "From the headers to the answer", registry=self._registry, buckets=_SECONDS
        )
        self._batches = Histogram(
            "locvlm_batch_size", "Queries answered together", registry=self._registry, buckets=(1, 2, 4, 8, 16, 32)
        )

    def request(self, form: str, status: int, seconds: float) -> None:
        """Count a request; the time of those that were answered."""
        self._requests.labels(form, str(status)).inc()
        if status == 200:
            self._seconds.observe(seconds)

    def batch(self, n: int) -> None:
        """Count a batch of n queries."""
        self._batches.observe(n)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
