"""config/prometheus.yml, alerts.yml and grafana_dashboard.json against the real Prometheus, which watches real daemons in trouble."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.busy import REVOKED, Busy
from tests.support.pipeline import DEADLINE
from tests.support.prometheus import CONFIG, have_prometheus, model, promtool, queries, variables
from tests.support.servers import need
from tests.support.wait import until

CASES = Path(__file__).parent / "alerts_test.yml"


@pytest.fixture(scope="module")
def busy() -> Iterator[Busy]:
    """Daemons, mail and Prometheus, shared by the tests of this module."""
    need(have_prometheus(), "prometheus")
    with Busy() as running:
        running.workers.append(running.start_worker())
        running.pipeline.wait_for_first_poll()
        running.pipeline.deliver(*["ordinary"] * 60, *["slow 30"] * 10, *["fail 1"] * 3, "crm")
        running.pipeline.deliver(*["large"] * 9, body=b"x" * 100_000)
        running.pipeline.deliver(*["permanent"] * 9)
        yield running


# the files


def test_prometheus_takes_the_configuration() -> None:
    """promtool check config, which checks the rules too; check rules."""
    need(have_prometheus(), "prometheus")
    for args in (("check", "config", CONFIG / "prometheus.yml"), ("check", "rules", CONFIG / "alerts.yml")):
        checked = promtool(*args)
        assert checked.returncode == 0, checked.stdout


def test_each_alert_fires_and_stays_quiet() -> None:
    """promtool test rules on cases by hand; each alert has one that fires and one that does not."""
    need(have_prometheus(), "prometheus")
    checked = promtool("test", "rules", CASES)
    assert checked.returncode == 0, checked.stdout
    looked: dict[str, set[bool]] = {}
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for look in case["promql_expr_test"]:
            [name] = re.findall(r'alertname="(\w+)"', look["expr"])
            assert name == case["name"]
            looked.setdefault(name, set()).add(bool(look["exp_samples"]))
    rules = [rule["alert"] for group in yaml.safe_load((CONFIG / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
    assert looked == {name: {True, False} for name in rules}


# what runs


def test_every_daemon_is_found_and_up(busy: Busy) -> None:
    """By the producer's /targets alone: one producer, two workers, and a third that came when Prometheus already ran."""
    prometheus = busy.prometheus
    until(lambda: sorted(prometheus.targets().values()) == ["up"] * 4, DEADLINE, "four daemons are up")
    told = {'role="producer"': 1, 'role="worker"': 3}
    until(lambda: prometheus.query("count by (role) (email_build_info)") == told, DEADLINE, "each has told its role")
    counted = 'max by (role) (email_daemons{state="alive"})'  # the role of those counted, not of the one that counts
    until(lambda: prometheus.query(counted) == told, DEADLINE, "the producer counts them")


def test_no_panel_is_empty(busy: Busy) -> None:
    """Each expression, sent as Grafana sends it, has a number that is none of NaN; so have the variables."""
    prometheus = busy.prometheus
    busy.sandbox.faults.bye(times=2)
    empty: list[str] = []

    def full() -> bool:
        busy.pipeline.deliver("ordinary")
        empty[:] = [
            f"{query.row}, {query.panel}: {query.sent()}"
            for query in queries()
            if not any(not math.isnan(value) for value in prometheus.query(query.sent()).values())
        ]
        return not empty

    try:
        until(full, DEADLINE, "no panel is empty")
    except AssertionError:
        pytest.fail("empty:\n" + "\n".join(empty))
    for query in variables().values():
        found = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", query)
        assert found, query
        assert prometheus.ask(f"label/{found[2]}/values", **{"match[]": found[1]}), query


def test_alerts_fire_and_say_of_what(busy: Busy) -> None:
    """Loaded and evaluated without an error; those of this trouble fire, with names and numbers in their sentences."""
    prometheus = busy.prometheus
    account = busy.pipeline.account

    def said() -> dict[str, str]:
        return {alert["labels"]["alertname"]: alert["annotations"]["summary"] for alert in prometheus.ask("alerts")["alerts"]}

    wanted = {"EmailDeadLettersNearlyFull", "EmailQuotaNear", "EmailConsentSevenDays", "EmailReauthenticationNeeded"}
    until(lambda: wanted <= set(said()), DEADLINE, f"{wanted} are pending or firing")
    found = said()
    assert found["EmailDeadLettersNearlyFull"] == "The dead letters are at 90% of DLQ_MAX"
    assert re.fullmatch(rf"{account} has read \d+(\.\d+)?% of its bytes for today", found["EmailQuotaNear"])
    assert re.fullmatch(rf"The consent of {account} is 6d 1\dh \d+m \d+s old", found["EmailConsentSevenDays"])
    assert found["EmailReauthenticationNeeded"] == f"{REVOKED}/INBOX cannot be read: its login is refused for good"
    assert "EmailNoProducer" not in found
    rules: list[Any] = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, [rule.get("lastError") for rule in rules]
    shown = model()["annotations"]["list"][0]["expr"]
    assert any('alertname="EmailDeadLettersNearlyFull"' in labels for labels in prometheus.query(shown))


def test_a_killed_worker_is_down_at_once(busy: Busy) -> None:
    """kill -9: the next scrape says so, while its registration still counts as alive."""
    prometheus = busy.prometheus
    until(lambda: set(prometheus.targets().values()) == {"up"}, DEADLINE, "all are up")
    busy.workers[0].kill9()
    until(lambda: sorted(set(prometheus.targets().values())) == ["down", "up"], DEADLINE, "one is down")
    until(lambda: prometheus.query('up{job="email-ingestion"} == 0'), DEADLINE, "its series says so")
