"""Spans for those who have OpenTelemetry (`requirements-handlers.txt`) and name an exporter; for all others nothing happens.

OTEL_TRACES_EXPORTER (console, otlp) or OTEL_EXPORTER_OTLP_ENDPOINT switch it on, as for every program that uses OpenTelemetry; its SDK
reads the rest of its variables itself (https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/).
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

END_SECONDS = 2.0  # a collector that is away may hold up the end of a daemon for so long

_provider: Any = None
_tracer: Any = None


def configure(service: str) -> None:
    """Once, at the start of a daemon. `service`: its service.name, unless OTEL_SERVICE_NAME gives another."""
    exporters = os.environ.get("OTEL_TRACES_EXPORTER") or ("otlp" if any(map(os.environ.get, ENDPOINTS)) else "none")
    if exporters == "none":
        return
    try:
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        resources = importlib.import_module("opentelemetry.sdk.resources")
        chosen = [_exporter(name.strip(), export) for name in exporters.split(",")]
    except ImportError as error:
        log.warning("no spans, although an exporter is configured: %s. Install: pip install -r requirements-handlers.txt", error)
        return
    name = os.environ.get("OTEL_SERVICE_NAME") or service
    provider = sdk.TracerProvider(resource=resources.Resource.create({"service.name": name}), shutdown_on_exit=False)
    for exporter in chosen:
        provider.add_span_processor(export.BatchSpanProcessor(exporter))
    importlib.import_module("opentelemetry.trace").set_tracer_provider(provider)  # a handler's own spans go there too
    global _provider, _tracer
    _provider, _tracer = provider, provider.get_tracer("email-ingestion-twins")
    log.info("spans go to OpenTelemetry (%s) as %s", exporters, name)


def enabled() -> bool:
    """Whether spans are made: who would have to decode a record to name one need not do it for nothing."""
    return _tracer is not None


def end() -> None:
    """Hand on the last spans, as the last step of a daemon."""
    if _provider is not None:
        last = threading.Thread(target=_provider.shutdown, name="spans", daemon=True)
        last.start()
        last.join(END_SECONDS)


def _exporter(name: str, export: Any) -> Any:
    if name == "console":
        return export.ConsoleSpanExporter()
    if name == "otlp":
        return importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter").OTLPSpanExporter()
    raise ImportError(f"OTEL_TRACES_EXPORTER={name} is not known here (console, otlp)")


@contextmanager
def span(
    name: str, traceparent: str = "", *, links: Sequence[str] = (), began: float | None = None, **attributes: str | int
) -> Iterator[str]:
    """Work of ours, as a child of `traceparent` (W3C), linked to `links`; yields the traceparent of what is done inside.

    `began`: when it began, seconds since 1970, if before now. An exception that leaves the block is noted in the span. Without
    OpenTelemetry nothing is done, and what was given is yielded.
    """
    if _tracer is None:
        yield traceparent
        return
    context = importlib.import_module("opentelemetry.trace.propagation.tracecontext").TraceContextTextMapPropagator()
    trace = importlib.import_module("opentelemetry.trace")

    def of(parent: str) -> Any:
        return context.extract({"traceparent": parent})

    with _tracer.start_as_current_span(
        name,
        context=of(traceparent) if traceparent else None,
        links=[trace.Link(trace.get_current_span(of(link)).get_span_context()) for link in links],
        start_time=None if began is None else int(began * 1e9),
        attributes=attributes,
    ):
        carrier: dict[str, str] = {}
        context.inject(carrier)
        yield carrier.get("traceparent", traceparent)
