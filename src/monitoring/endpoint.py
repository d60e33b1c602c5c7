"""The HTTP side of a daemon: a small Starlette application in a thread of its own."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import closing

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from src.common.exceptions import ConfigurationError
from src.common.shutdown import Shutdown

log = logging.getLogger(__name__)


def open_port(host: str, wanted: int | None, first: int) -> socket.socket:
    """A listening socket on `wanted`; None: on `first` or the next free of a hundred.

    Raises ConfigurationError where a port that was asked for by name is taken.
    """
    for port in [wanted] if wanted is not None else range(first, first + 100):
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(64)
        except OSError as error:
            listener.close()
            if wanted is not None:
                raise ConfigurationError(
                    f"HTTP_PORT={wanted}: cannot listen on {host}:{wanted} ({error.strerror}); choose another"
                ) from None
            continue
        return listener
    raise ConfigurationError(f"HTTP_PORT: no free port on {host} from {first} to {first + 99}")


def serve(listener: socket.socket, health: Callable[[], tuple[int, dict[str, object]]], shutdown: Shutdown) -> Callable[[], None]:
    """Answer GET /health on `listener` from a thread of its own. Returns the function that ends it."""

    async def get_health(request: Request) -> Response:
        status, body = health()
        return JSONResponse(body, status_code=status)

    async def unknown(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": f"no such page: {request.url.path}"}, status_code=404)

    app = Starlette(routes=[Route("/health", get_health)], exception_handlers={404: unknown})
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1))

    def run() -> None:
        with closing(listener):
            server.run(sockets=[listener])

    thread = shutdown.guard("endpoint", run)
    host, port = listener.getsockname()[:2]
    log.info("health: http://%s:%d/health", host, port)

    def stop() -> None:
        server.should_exit = True
        thread.join(timeout=3)

    return stop
