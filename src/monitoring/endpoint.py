"""The HTTP side of a daemon: a small Starlette application in a thread of its own."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, suppress
from typing import Literal

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from src.common.exceptions import ConfigurationError
from src.common.health import Page
from src.common.shutdown import Shutdown

log = logging.getLogger(__name__)

AGAIN_SECONDS = 10.0  # between two looks whether a port that was taken is free


def open_port(host: str, wanted: int | None, first: int, setting: str = "HTTP_PORT") -> socket.socket:
    """A listening socket on `wanted`; None: on `first` or the next free of a hundred. `setting`: what chose it.

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
                    f"{setting}={wanted}: cannot listen on {host}:{wanted} ({error.strerror}); choose another"
                ) from None
            continue
        return listener
    raise ConfigurationError(f"{setting}: no free port on {host} from {first} to {first + 99}")


HOST = re.compile(r"(\[[^\]]*\]|[^\[\]:]*|[0-9a-f:]*)(?::\d*)?")  # of a Host header: name, address, [IPv6], and a port
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def allowed_hosts(http_host: str, named: Collection[str]) -> frozenset[str]:
    """The names under which the endpoint answers; `*` among them: any."""
    return frozenset(name.lower().strip("[]") for name in (*LOOPBACK, http_host, *named))


def is_allowed(header: str, hosts: Collection[str]) -> bool:
    """Whether a request with this Host header is answered. A page of the web that points a name of its own at this machine is not.

    A request without one comes from no browser.
    """
    named = HOST.fullmatch(header.strip().lower())
    return not header or "*" in hosts or (named is not None and named[1].strip("[]") in hosts)


def serve(
    listener: socket.socket,
    pages: Mapping[str, Callable[[], Page]],
    hosts: Collection[str],
    shutdown: Shutdown,
    routes: Sequence[Route] = (),
    title: str = "health",
) -> Callable[[], None]:
    """Answer GET on `listener` from a thread of its own. Returns the function that ends it.

    `pages`: path → what makes its JSON, each time in a thread of a pool: one that hangs on a disk holds up no other. `routes`: pages that
    are no JSON. `hosts`: see `allowed_hosts`. `title`: of the page that the log names.
    """

    def route(path: str, page: Callable[[], Page]) -> Route:
        def answer(request: Request) -> Response:
            status, body = page()
            return JSONResponse(body, status_code=status)

        return Route(path, answer)

    async def unknown(request: Request, error: Exception) -> Response:
        return JSONResponse(
            {"error": f"no such page: {request.url.path}", "pages": sorted([*pages, *(route.path for route in routes)])},
            status_code=404,
        )

    async def not_get(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": f"{request.method} is not answered here"}, status_code=405, headers={"Allow": "GET, HEAD"})

    class Guarded:
        """Refuses what was sent to a name that is not ours."""

        def __init__(self, app: ASGIApp) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            app = self._app
            if scope["type"] == "http" and not is_allowed(Request(scope).headers.get("host", ""), hosts):
                app = JSONResponse({"error": "this host name is not allowed: name it in HTTP_ALLOWED_HOSTS"}, status_code=400)
            await app(scope, receive, send)

    app = Starlette(
        routes=[*(route(path, page) for path, page in pages.items()), *routes],
        middleware=[Middleware(Guarded)],
        exception_handlers={404: unknown, 405: not_get},
    )
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", server_header=False, timeout_graceful_shutdown=1)
    )

    def run() -> None:
        with closing(listener):
            server.run(sockets=[listener])

    thread = shutdown.guard("endpoint", run)
    address = address_of(listener)
    log.info(
        "%s: %s/%s%s", title, address, title, f", status page: {address}/" if any(route.path == "/" for route in routes) else ""
    )

    def stop() -> None:
        server.should_exit = True
        thread.join(timeout=3)

    return stop


def plain(path: str, content_type: str, make: Callable[[], bytes]) -> Route:
    """A page that is no `Page`: what `make` returns, made anew for each request in a thread of the pool."""

    def answer(request: Request) -> Response:
        return Response(make(), headers={"content-type": content_type})

    return Route(path, answer)


def serve_metrics(
    host: str, port: int | Literal["off"] | None, page: Route, hosts: Collection[str], shutdown: Shutdown, *, asks_again: bool
) -> Callable[[], None]:
    """METRICS_PORT: `page` alone, on a port of its own, where one is wanted. Returns the function that ends it.

    One that is taken is a warning: the page is on the daemon's own port anyway. `asks_again`: it is taken when it is free, for the standby
    that takes a mailbox over is to be found where the producer before it was.
    """
    if port is None or port == "off":
        return lambda: None
    ends: list[Callable[[], None]] = []

    def listen() -> None:
        ends.append(serve(open_port(host, port, 0, "METRICS_PORT"), {}, hosts, shutdown, [page], "metrics"))

    def ask_again() -> None:
        while not (ends or shutdown.wait(AGAIN_SECONDS)):
            with suppress(ConfigurationError):
                listen()

    try:
        listen()
    except ConfigurationError as error:
        log.warning("%s, or METRICS_PORT=off. /metrics is answered on the daemon's own port (HTTP_PORT) all the same", error)
        if asks_again:
            shutdown.guard("metrics port", ask_again)

    def end() -> None:
        for end_one in ends:
            end_one()

    return end


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
