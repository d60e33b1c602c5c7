"""`GET /` of a daemon: what a person at three in the morning wants to know. The pieces: `page_look` asks Redis, `page_flow` counts by
the minute, `page_verdict` judges, `page_html` draws."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from src.common.clock import Clock
from src.common.error_groups import group_of
from src.common.exceptions import IngestionError
from src.common.health import Page
from src.common.registry import News
from src.monitoring import page_html
from src.monitoring.page_look import Onlooker
from src.monitoring.page_verdict import View

ENTRY_ID = re.compile(r"\d{1,20}-\d{1,20}")


def routes(
    onlooker: Onlooker, status: Callable[[], Page], news: Callable[[], News], clock: Clock, *, bodies: bool
) -> list[Route]:
    """`status`: what /status says; `news`: what the heartbeat says. `bodies`: STATUS_PAGE_BODIES. Each page is made in a thread of the
    endpoint's pool."""

    def look() -> View:
        view = View(onlooker.seen(patient=False), status()[1], news(), clock.wall())
        return view if view.away else replace(view, snapshot=onlooker.seen(), now=clock.wall())

    def whole(request: Request) -> Response:
        return _answer(page_html.page(look(), request.url.hostname or ""))

    def fragment(request: Request) -> Response:
        return _answer(page_html.fragment(look(), request.url.hostname or ""))

    def letter(request: Request) -> Response:
        view, letter_id = look(), request.path_params["letter_id"]
        note = partial(page_html.note_page, view)
        try:
            fields = onlooker.letter(letter_id) if ENTRY_ID.fullmatch(letter_id) else None
        except (TimeoutError, IngestionError) as error:
            return _answer(note("Redis does not answer now", f"{error or 'It takes too long'}. Try again in a moment."), 503)
        if fields is None:
            return _answer(
                note("No such dead letter", f"{letter_id} is not there: it was replayed or discarded, or never died."), 404
            )
        return _answer(page_html.letter_page(view, letter_id, fields, group_of(fields), bodies=bodies))

    return [Route("/", whole), Route("/fragment", fragment), Route("/dead/{letter_id}", letter)]


def _answer(text: str, status: int = 200) -> Response:
    return HTMLResponse(text.encode(errors="replace"), status, headers=page_html.HEADERS)
