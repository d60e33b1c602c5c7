"""Trace contexts and spans: what a mail carries without OpenTelemetry, and what is exported with it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from src.common import tracing
from src.common.correlation import traceparent_of

VARIABLES = ("OTEL_TRACES_EXPORTER", *tracing.ENDPOINTS)


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What was exported."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def test_a_correlation_id_gives_one_trace_context() -> None:
    """W3C's form, the same for the same id, another for another."""
    one = traceparent_of("939a03b561e5a7a2")
    assert re.fullmatch(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-01", one)
    assert one == traceparent_of("939a03b561e5a7a2") != traceparent_of("another")


def test_without_opentelemetry_nothing_happens() -> None:
    """What was given is yielded, an exception passes through."""
    tracing.configure("email-producer")
    with tracing.span("publish", links=["00-1-2-01"], began=1.0, mails=2) as traceparent:
        assert traceparent == ""
    with pytest.raises(ZeroDivisionError), tracing.span("handle", "00-1-2-01") as traceparent:
        assert traceparent == "00-1-2-01"
        raise ZeroDivisionError
    tracing.end()


def test_an_exporter_without_the_package_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The daemon runs on, and says what to install; so does one with an exporter that is not known."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console,zipkin")
    tracing.configure("email-producer")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delenv("OTEL_TRACES_EXPORTER")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    tracing.configure("email-producer")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "OTEL_TRACES_EXPORTER=zipkin" in caplog.messages[0]
    assert "pip install -r requirements-handlers.txt" in caplog.messages[1]
    with tracing.span("fetch") as traceparent:
        assert traceparent == ""


def test_handling_is_a_child_of_fetching_and_publishing_is_linked(spans: InMemorySpanExporter) -> None:
    """One trace a mail, from intake over the record to its handler; a batch belongs to all its mails."""
    with tracing.span("fetch", began=1000.5, email_id="gm:a:1") as mail:
        pass
    with tracing.span("publish", links=[mail], mails=1):
        pass
    with pytest.raises(ZeroDivisionError), tracing.span("handle", mail) as inside:
        assert inside != mail
        raise ZeroDivisionError
    fetch, publish, handle = spans.get_finished_spans()
    assert mail.split("-")[1:3] == [f"{fetch.context.trace_id:032x}", f"{fetch.context.span_id:016x}"]
    assert (fetch.parent, fetch.start_time, dict(fetch.attributes or {})) == (None, 1000_500_000_000, {"email_id": "gm:a:1"})
    assert [link.context.span_id for link in publish.links] == [fetch.context.span_id]
    assert publish.context.trace_id != fetch.context.trace_id
    assert handle.parent is not None
    assert (handle.context.trace_id, handle.parent.span_id) == (fetch.context.trace_id, fetch.context.span_id)
    assert [event.name for event in handle.events] == ["exception"]


def test_a_context_that_no_span_of_ours_began_is_a_parent_too(spans: InMemorySpanExporter) -> None:
    """The producer had no OpenTelemetry, the worker has it: the trace id of the record stays."""
    given = traceparent_of("939a03b561e5a7a2")
    with tracing.span("handle", given) as inside:
        assert inside.split("-")[1] == given.split("-")[1]
    [handle] = spans.get_finished_spans()
    assert handle.parent is not None
    assert f"{handle.parent.span_id:016x}" == given.split("-")[2]
