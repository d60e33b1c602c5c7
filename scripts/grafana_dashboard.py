"""Makes config/grafana_dashboard.json, or checks that it is up to date.

The panels are told below; thresholds are those of config/alerts.yml. The JSON is built with Grafana's own types (grafana-foundation-sdk)
and is imported as it is: Grafana then asks which Prometheus it reads from.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    GraphThresholdsStyleMode,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

import _path  # noqa: F401  # the umask, as in every script

ROOT = Path(__file__).resolve().parents[1]
FILE, ALERTS = ROOT / "config" / "grafana_dashboard.json", ROOT / "config" / "alerts.yml"
GRAFANA = "11.6.0"  # the version whose types these are; later ones read older dashboards
SOURCE = DataSourceRef(type_val="prometheus", uid="${DS_PROMETHEUS}")  # filled in by the import, from __inputs
WELL, COLOURS = "green", {"warning": "orange", "critical": "red"}
LAST_COMPARISON = re.compile(r"([<>]|==) *([\d.]+)$")
QUIET_STATES = "STARTING|CONNECTED|BACKFILL_PAUSED|STANDBY|STOPPED"

BOX = 'account=~"$account",mailbox=~"$mailbox"'
OF_ACCOUNT = 'account=~"$account"'
QUOTA = "email_producer_quota"
WORKER = 'instance=~"$instance"'
RATE = "[$__rate_interval]"
OURS = "* on (instance, job) group_left (role) email_build_info"  # of a metric that every program has: our daemons' only

Built = stat.Panel | timeseries.Panel | statetimeline.Panel | bargauge.Panel


@dataclass(frozen=True)
class Panel:
    """`queries`: (expression, legend). `unit`: of Grafana. `alert`: of config/alerts.yml, whose threshold the panel shows; its
    expression and the panel's are in one unit. `width`: of 24. `stacked`: lines add up to something."""

    title: str
    meaning: str
    unit: str
    queries: Sequence[tuple[str, str]]
    kind: Literal["line", "stat", "states", "bars"] = "line"
    alert: str = ""
    width: int = 8
    stacked: bool = False


def rate(metric: str, labels: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{labels}}}{RATE}))"


def quantile(part: float, metric: str, labels: str, by: str = "") -> str:
    grouped = f"le, {by}" if by else "le"
    return f"histogram_quantile({part}, sum by ({grouped}) (rate({metric}_bucket{{{labels}}}{RATE})))"


ROWS: tuple[tuple[str, Sequence[Panel]], ...] = (
    (
        "Now",
        (
            Panel(
                "Alerts firing",
                "Of config/alerts.yml. Each has a runbook.",
                "short",
                [('sum(ALERTS{alertname=~"Email.+",alertstate="firing"}) or vector(0)', "")],
                "stat",
                width=4,
            ),
            Panel(
                "Unfinished mails",
                "All that stand in the stream.",
                "short",
                [("max(email_stream_live_mails)", "")],
                "stat",
                width=4,
            ),
            Panel(
                "Oldest unfinished mail",
                "Since it was published.",
                "s",
                [("max(email_stream_oldest_age_seconds)", "")],
                "stat",
                "EmailOldestMailTooOld",
                4,
            ),
            Panel(
                "Dead letters", "python scripts/dlq.py groups", "short", [("max(email_stream_dead_letters)", "")], "stat", width=4
            ),
            Panel(
                "Workers alive",
                "By their registrations.",
                "short",
                [('max(email_daemons{role="worker",state="alive"})', "")],
                "stat",
                "EmailNoWorker",
                4,
            ),
            Panel(
                "Unaccounted mails",
                "Found by the producer's own audit; python scripts/audit.py names them.",
                "short",
                [("max(email_stream_unaccounted_mails)", "")],
                "stat",
                "EmailUnaccounted",
                4,
            ),
        ),
    ),
    (
        "Flow",
        (
            Panel(
                "Mails",
                "Fetched: read from a mailbox. Published: entered the stream. Started: given to a handler. Done: left the stream.",
                "suffix: /s",
                [
                    (rate("email_producer_fetched_total", BOX), "fetched"),
                    (rate("email_producer_published_total", BOX), "published"),
                    (rate("email_worker_done_total", WORKER), "done"),
                    (rate("email_worker_started_total", WORKER), "started"),
                ],
                width=12,
            ),
            Panel(
                "Unfinished mails, by what they wait for",
                "Unread: for a worker. In flight: for their handler. Waiting: for their next attempt.",
                "short",
                [
                    ("max(email_stream_unread_mails)", "unread"),
                    ("max(email_stream_in_flight_mails)", "in flight"),
                    ("max(email_stream_waiting_mails)", "waiting"),
                ],
                width=12,
                stacked=True,
            ),
            Panel(
                "Part of STREAM_MAXLEN",
                "At 100 % intake waits; nothing is ever trimmed.",
                "percentunit",
                [("max(email_stream_live_mails) / max(email_stream_max_mails)", "unfinished mails")],
                alert="EmailStreamNearlyFull",
            ),
            Panel(
                "Read from the mail servers",
                "Bodies of mails.",
                "Bps",
                [(rate("email_producer_fetched_bytes_total", BOX, "account"), "{{account}}")],
            ),
            Panel(
                "Intake paused",
                "1 while mail waits in its mailbox, for room in Redis or in the stream.",
                "short",
                [("max(email_producer_paused)", "paused")],
                alert="EmailIntakePaused",
            ),
        ),
    ),
    (
        "Latency",
        (
            Panel(
                "From the stream to done",
                "From the moment a mail was published until its handler had finished.",
                "s",
                [(quantile(q, "email_worker_intake_to_done_seconds", WORKER), f"{q:.0%} of mails") for q in (0.5, 0.95, 0.99)],
                width=12,
            ),
            Panel(
                "Handlers",
                "95 of 100 calls took less.",
                "s",
                [(quantile(0.95, "email_worker_handler_seconds", WORKER, "handler"), "{{handler}}")],
                width=12,
            ),
            Panel(
                "Oldest unfinished mail",
                "Since it was published.",
                "s",
                [("max(email_stream_oldest_age_seconds)", "oldest")],
                alert="EmailOldestMailTooOld",
            ),
            Panel(
                "Intake",
                "95 of 100 took less: one FETCH of bodies, one batch into the stream.",
                "s",
                [
                    (quantile(0.95, "email_producer_fetch_seconds", ""), "fetch"),
                    (quantile(0.95, "email_producer_publish_seconds", ""), "publish"),
                ],
            ),
            Panel(
                "Longest in a worker's hands",
                "One that only grows hangs in its handler.",
                "s",
                [(f"max by (instance) (email_worker_oldest_in_flight_seconds{{{WORKER}}})", "{{instance}}")],
            ),
        ),
    ),
    (
        "Mailboxes",
        (
            Panel(
                "State of each mailbox",
                "curl localhost:8080/status says why, and what to run.",
                "short",
                [
                    (
                        f"max by (account, mailbox, state) (email_producer_mailbox_state{{{BOX}}}) == 1",
                        "{{account}}/{{mailbox}} {{state}}",
                    )
                ],
                "states",
                width=24,
            ),
            Panel(
                "Since the mail server answered",
                "One of the producers that watch a mailbox is enough.",
                "s",
                [(f"min by (account, mailbox) (email_producer_contact_age_seconds{{{BOX}}})", "{{account}}/{{mailbox}}")],
                alert="EmailMailboxWithoutContact",
            ),
            Panel(
                "Access token runs out in",
                "It is refreshed by the next login.",
                "s",
                [(f"max by (account) (email_producer_token_expiry_seconds{{{OF_ACCOUNT}}})", "{{account}}")],
                alert="EmailTokenNotRefreshed",
            ),
            Panel(
                "Age of the consent",
                "While Google's console has the app in testing, a consent ends after 7 days.",
                "s",
                [(f"max by (account) (email_producer_token_age_seconds{{{OF_ACCOUNT}}})", "{{account}}")],
                alert="EmailConsentSevenDays",
            ),
            Panel(
                "Part of DAILY_BYTES",
                "At 100 % old mail waits for tomorrow; new mail does not.",
                "percentunit",
                [(f"max by (account) ({QUOTA}_used_bytes{{{OF_ACCOUNT}}} / {QUOTA}_limit_bytes{{{OF_ACCOUNT}}})", "{{account}}")],
                alert="EmailQuotaNear",
            ),
            Panel(
                "IMAP sessions that ended",
                "Since the producers began, by reason. One an hour is how servers are.",
                "short",
                [(f"sum by (reason) (email_producer_reconnects_total{{{BOX}}})", "{{reason}}")],
            ),
            Panel(
                "Known already, and passed over",
                "Looked at again, and left out by INITIAL_SYNC.",
                "short",
                [
                    (f"sum(email_producer_known_total{{{BOX}}})", "known already"),
                    (f"sum(max by (account, mailbox) (email_producer_passed_mails{{{BOX}}}))", "passed over"),
                ],
            ),
        ),
    ),
    (
        "Failures",
        (
            Panel(
                "Dead letters, part of DLQ_MAX",
                "At 100 % workers stop reading.",
                "percentunit",
                [("max(email_stream_dead_letters) / max(email_stream_dead_letters_max)", "dead letters")],
                alert="EmailDeadLettersNearlyFull",
            ),
            Panel(
                "Dead letters of the last half hour",
                "Less those that were replayed or discarded.",
                "short",
                [("max(delta(email_stream_dead_letters[30m]))", "more")],
                alert="EmailDeadLettersGrowing",
            ),
            Panel(
                "Buried, by error",
                "Since the workers began. python scripts/dlq.py groups has file and function of each.",
                "short",
                [(f'sum by (error) (email_worker_dead_total{{{WORKER},error=~"$error"}})', "{{error}}")],
                "bars",
            ),
            Panel(
                "What did not simply end in done",
                "Postponed: behind an open breaker. Recovered: taken over from a worker that stopped renewing. "
                "Duplicates: done before, dropped. Leases lost: another worker's by then. Expired: dead letters given up after DLQ_DAYS.",
                "suffix: /s",
                [
                    (rate(f"email_worker_{name}_total", WORKER), name.replace("_", " "))
                    for name in ("retried", "postponed", "recovered", "duplicates", "leases_lost", "expired")
                ],
                width=12,
            ),
            Panel(
                "Breakers that are closed",
                "0: what is behind it fails, and is asked only now and then.",
                "short",
                [('min by (instance, breaker) (email_breaker_state{state="closed"})', "{{breaker}} of {{instance}}")],
                alert="EmailBreakerOpen",
                width=12,
            ),
        ),
    ),
    (
        "Redis",
        (
            Panel(
                "Memory",
                "MEMORY_HIGH (85 % of maxmemory) pauses intake.",
                "bytes",
                [
                    ("max(email_redis_used_memory_bytes)", "used"),
                    ("max(email_redis_max_memory_bytes)", "maxmemory (0: no limit)"),
                ],
            ),
            Panel(
                "Part of maxmemory",
                "Without a limit there is no part.",
                "percentunit",
                [("max(email_redis_used_memory_bytes) / (max(email_redis_max_memory_bytes) > 0)", "used")],
                alert="EmailRedisMemoryHigh",
            ),
            Panel(
                "Round trips",
                "99 of 100 calls took less, without those that wait for mail on purpose.",
                "s",
                [(quantile(0.99, "email_redis_roundtrip_seconds", "", "instance"), "{{instance}}")],
            ),
            Panel(
                "Daemons that Redis does not answer",
                "",
                "short",
                [("sum(email_redis_up == bool 0)", "daemons")],
                alert="EmailRedisDown",
                width=12,
            ),
            Panel(
                "Results kept",
                "A log of finished mails, trimmed at RESULTS_MAX and RESULTS_DAYS.",
                "short",
                [("max(email_stream_results)", "results")],
                width=12,
            ),
        ),
    ),
    (
        "Workers",
        (
            Panel(
                "Daemons",
                "By their registrations. Silent: killed or cut off, for up to a day.",
                "short",
                [("max by (role, state) (email_daemons)", "{{role}}s {{state}}")],
            ),
            Panel(
                "Done, by worker",
                "",
                "suffix: /s",
                [(rate("email_worker_done_total", WORKER, "instance"), "{{instance}}")],
                stacked=True,
            ),
            Panel(
                "In flight, by worker",
                "Mails in its hands.",
                "short",
                [(f"sum by (instance) (email_worker_in_flight_mails{{{WORKER}}})", "{{instance}}")],
                stacked=True,
            ),
            Panel(
                "Reading",
                "0: dead letters, breakers or mail of a newer version keep it from reading; its /ready says which.",
                "short",
                [(f"max by (instance) (email_worker_reading{{{WORKER}}})", "{{instance}}")],
                alert="EmailWorkerNotReading",
            ),
            Panel("Memory", "", "bytes", [(f"process_resident_memory_bytes {OURS}", "{{role}} {{instance}}")]),
            Panel(
                "CPU", "1: a whole core.", "short", [(f"rate(process_cpu_seconds_total{RATE}) {OURS}", "{{role}} {{instance}}")]
            ),
        ),
    ),
)

VARIABLES = (
    ("account", "Account", "label_values(email_producer_mailbox_state, account)"),
    ("mailbox", "Mailbox", 'label_values(email_producer_mailbox_state{account=~"$account"}, mailbox)'),
    ("instance", "Worker", "label_values(email_worker_reading, instance)"),
    ("error", "Error", "label_values(email_worker_dead_total, error)"),
)


@cache
def alerts() -> Mapping[str, Mapping[str, Any]]:
    """Name → rule of config/alerts.yml."""
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def steps(rule: Mapping[str, Any]) -> list[Threshold]:
    """The colours of a panel: good, and as the alert's severity from its threshold on (or below it)."""
    found = LAST_COMPARISON.search(rule["expr"])
    assert found, f"{rule['alert']} does not end with a threshold"
    sign, number = found[1], float(found[2])
    ill = COLOURS[rule["labels"]["severity"]]
    if sign == "<":
        return [Threshold(None, ill), Threshold(number, WELL)]
    if sign == "==" and number == 0:
        return [Threshold(None, ill), Threshold(1.0, WELL)]
    above = number if sign == "==" or number else 1.0  # more than nothing is one
    return [Threshold(None, WELL), Threshold(above, ill)]


def built(panel: Panel) -> Built:
    shown: Built
    multi = common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI)
    thresholds = dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE)
    thresholds.steps(steps(alerts()[panel.alert]) if panel.alert else [Threshold(None, WELL)])
    match panel.kind:
        case "stat":
            colour = BigValueColorMode.BACKGROUND if panel.alert else BigValueColorMode.NONE
            last = common.ReduceDataOptions().calcs(["lastNotNull"])
            shown = stat.Panel().graph_mode(BigValueGraphMode.AREA).color_mode(colour).reduce_options(last).height(4)
        case "states":
            shown = statetimeline.Panel().show_value(VisibilityMode.NEVER).tooltip(multi).height(8)
            for colour_of, states in ((WELL, f"({QUIET_STATES})"), ("red", f"(?!{QUIET_STATES})[A-Z_]+")):
                fixed = {"mode": "fixed", "fixedColor": colour_of}
                shown.override_by_regexp(f"/ {states}$/", [DynamicConfigValue("color", fixed)])
        case "bars":
            last = common.ReduceDataOptions().calcs(["lastNotNull"])
            shown = bargauge.Panel().reduce_options(last).height(8)
        case "line":
            shown = timeseries.Panel().tooltip(multi).fill_opacity(30 if panel.stacked else 8).height(8)
            if panel.stacked:
                shown.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
            if panel.alert:
                shown.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
    by_line = panel.kind in ("line", "bars")
    shown.color_scheme(dashboard.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC if by_line else FieldColorModeId.THRESHOLDS))
    shown.title(panel.title).unit(panel.unit).span(panel.width).datasource(SOURCE).thresholds(thresholds)
    shown.description(" ".join(part for part in (panel.meaning, f"Alert: {panel.alert}." if panel.alert else "") if part))
    if panel.unit in ("short", "percentunit", "bytes", "suffix: /s", "Bps"):
        shown.min(0)
    for letter, (expr, legend) in zip("ABCDEF", panel.queries, strict=False):
        query = prometheus.Dataquery().ref_id(letter).expr(expr).legend_format(legend or "__auto").datasource(SOURCE)
        shown.with_target(query.instant() if panel.kind == "bars" else query.range())
    return shown


def variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    chosen = VariableOption(selected=True, text=["All"], value=["$__all"])
    made = dashboard.QueryVariable(name).label(label).query(query).datasource(SOURCE).current(chosen)
    return (
        made.multi(True)
        .include_all(True)
        .all_value(".*")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )


def dashboard_text() -> str:
    """The text of config/grafana_dashboard.json."""
    made = dashboard.Dashboard("Email ingestion twins").uid("email-ingestion-twins").tags(["email"])
    made.description("Made by scripts/grafana_dashboard.py; docs/dashboard.md shows it.")
    made.time("now-3h", "now").refresh("30s").timezone("browser").tooltip(DashboardCursorSync.CROSSHAIR).editable()
    for name, label, query in VARIABLES:
        made.with_variable(variable(name, label, query))
    fired = dashboard.AnnotationQuery().name("Alerts").datasource(SOURCE).enable(True).hide(False).icon_color("red")
    made.annotation(fired.expr('ALERTS{alertname=~"Email.+",alertstate="firing"}'))
    for title, panels in ROWS:
        made.with_row(dashboard.Row(title))
        for panel in panels:
            made.with_panel(built(panel))
    model = json.loads(json.dumps(made.build(), cls=JSONEncoder))
    for number, panel_json in enumerate(model["panels"], start=1):
        panel_json["id"] = number
    kinds = sorted({panel["type"] for panel in model["panels"]} - {"row"})
    asked = {"name": "DS_PROMETHEUS", "label": "Prometheus", "description": "", "type": "datasource", "pluginId": "prometheus"}
    needs = [
        {"type": "grafana", "id": "grafana", "name": "Grafana", "version": GRAFANA},
        {"type": "datasource", "id": "prometheus", "name": "Prometheus", "version": "1.0.0"},
        *({"type": "panel", "id": kind, "name": kind, "version": ""} for kind in kinds),
    ]
    whole = {"__inputs": [{**asked, "pluginName": "Prometheus"}], "__requires": needs, **model}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Exit code 0; 1 with --check where the file is not what this script makes."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="bring the file up to date")
    what.add_argument("--check", action="store_true", help="say whether it is up to date")
    options = parser.parse_args()
    if options.write:
        FILE.write_text(dashboard_text(), encoding="utf-8")
    elif not FILE.exists() or FILE.read_text(encoding="utf-8") != dashboard_text():
        print(f"{FILE.name} is out of date: run python scripts/grafana_dashboard.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
