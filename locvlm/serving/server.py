"""The application on a port of this machine."""

import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn

from locvlm.errors import ConfigError
from locvlm.serving.app import About, Engine, make_app
from locvlm.serving.limits import Limits

log = logging.getLogger(__name__)

_CONNECTIONS = 256  # open ones, also those that send nothing
_GRACE = 30  # seconds that requests have to end after a signal


class _Server(uvicorn.Server):
    """Says `ready` when it listens. Ends on SIGTERM and SIGINT and then returns, where uvicorn's own would kill the
    process by the same signal."""

    def __init__(self, config: uvicorn.Config, ready: str) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        print(self._ready, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(engine: Engine, limits: Limits, about: About, host: str, port: int) -> None:
    """Serve until a signal; requests under way are answered first. Port 0: a free one. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as fault:
            raise ConfigError(
                f"serving on {host} port {port}: {fault.strerror}; choose another --port or --host"
            ) from None
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        config = uvicorn.Config(
            make_app(engine, limits, about),
            http="h11",  # the one of uvicorn's two that bounds the headers
            ws="none",
            log_level="warning",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=_GRACE,
        )
        _Server(config, f"serving {about.model} at http://{shown}:{listening.getsockname()[1]}/").run([listening])
    log.info("stopped")
