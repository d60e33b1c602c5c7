"""config/alerts.yml and config/grafana_dashboard.json: what can be said of them without a running Prometheus."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.monitoring.metrics import PRODUCER, WORKER
from tests.support.daemons import ROOT
from tests.support.prometheus import CONFIG, have_prometheus, model, promtool, queries, variables
from tests.support.servers import need

RULES = {
    rule["alert"]: rule for group in yaml.safe_load((CONFIG / "alerts.yml").read_text())["groups"] for rule in group["rules"]
}
PANELS = [panel for panel in model()["panels"] if panel["type"] != "row"]
METRICS = {metric.name: metric for metric in (*PRODUCER, *WORKER)}
SUFFIXES = r"(?:_bucket|_sum|_count)?"
BY_PROMETHEUS = {"up", "ALERTS"}
OF_THE_PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total"}
SEVERITY_COLOURS = {"warning": "orange", "critical": "red"}

# the file


def test_the_dashboard_is_what_its_generator_writes() -> None:
    """scripts/grafana_dashboard.py finds nothing to change."""
    command = [sys.executable, "scripts/grafana_dashboard.py", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_an_outdated_dashboard_is_noticed(tmp_path: Path) -> None:
    """One title changed by hand: the check says what to run and ends with 1."""
    wrong = tmp_path / "dashboard.json"
    wrong.write_text((CONFIG / "grafana_dashboard.json").read_text().replace("Round trips", "Round-trips"))
    program = f"import grafana_dashboard as made, pathlib, sys; made.FILE = pathlib.Path({str(wrong)!r}); sys.exit(made.main())"
    command = [sys.executable, "-c", program, "--check"]
    checked = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True, check=False)
    assert checked.returncode == 1
    assert "run python scripts/grafana_dashboard.py --write" in checked.stderr


def test_it_is_imported_as_it_is() -> None:
    """The data source is an input and nothing names another; panels have their own ids and places; variables are declared."""
    whole = model()
    assert [asked["name"] for asked in whole["__inputs"]] == ["DS_PROMETHEUS"]
    assert sources(whole) == {"${DS_PROMETHEUS}"}
    assert {needed["id"] for needed in whole["__requires"] if needed["type"] == "panel"} == {panel["type"] for panel in PANELS}
    ids = [panel["id"] for panel in whole["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [cell for panel in whole["panels"] for cell in cells_of(panel["gridPos"])]
    assert len(set(cells)) == len(cells), "two panels lie over each other"
    assert max(x for x, _ in cells) < 24
    assert [panel["title"] for panel in whole["panels"] if panel["type"] == "row"] == [
        "Now", "Flow", "Latency", "Mailboxes", "Failures", "Redis", "Workers",
    ]  # fmt: skip
    used = {name for query in queries() for name in re.findall(r"\$(\w+)", query.expression)} - {"__rate_interval"}
    assert used == set(variables()), "each variable narrows something"


def sources(node: Any) -> set[str]:
    """All data sources named anywhere in it."""
    if isinstance(node, list):
        return set().union(*map(sources, node))
    if not isinstance(node, dict):
        return set()
    own = {node["datasource"]["uid"]} if "datasource" in node else set()
    return own.union(*map(sources, node.values()))


def cells_of(place: dict[str, int]) -> list[tuple[int, int]]:
    return [(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])]


# its expressions


def test_a_real_parser_takes_every_expression(tmp_path: Path) -> None:
    """Each as a rule of its own, checked by promtool; one that is broken is refused."""
    need(have_prometheus(), "prometheus")
    rules = [{"record": f"expression_{number}", "expr": query.sent()} for number, query in enumerate(queries())]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = promtool("check", "rules", path)
    assert checked.returncode == 0, checked.stdout
    assert f"{len(rules)} rules found" in checked.stdout
    path.write_text(path.read_text().replace("max(", "max((", 1))
    assert promtool("check", "rules", path).returncode != 0


def test_only_metrics_that_there_are_and_all_of_them() -> None:
    """Alerts, panels and variables name what src/monitoring/metrics.py declares, with its labels; and nothing declared goes unseen."""
    shown = "\n".join([*(query.expression for query in queries()), *variables().values()])
    judged = "\n".join(rule["expr"] for rule in RULES.values())
    named = set(re.findall(r"\b((?:email|process)_\w+)", shown + judged))
    for name in named - OF_THE_PROCESS:
        metric = METRICS.get(re.sub(rf"{SUFFIXES}$", "", name)) or METRICS.get(name)
        assert metric, name
        for labels in re.findall(rf"\b{name}\{{([^}}]*)\}}", shown + judged):
            asked = set(re.findall(r"(\w+)(?:=~|!=|=)", labels))
            assert asked <= {*metric.labels, "instance"}, (name, labels)
    assert {name for name in METRICS if not re.search(rf"\b{name}{SUFFIXES}\b", shown)} == set()


# thresholds


def threshold(name: str) -> tuple[str, float]:
    """The comparison at the end of an alert's expression."""
    *_, sign, number = RULES[name]["expr"].split()
    return sign, float(number)


@pytest.mark.parametrize(
    "panel", [panel for panel in PANELS if "Alert: " in panel["description"]], ids=lambda panel: panel["title"]
)
def test_thresholds_are_those_of_the_alerts(panel: dict[str, Any]) -> None:
    """The colour of the alert's severity begins where the alert fires, and the panel asks what the alert asks."""
    found = re.search(r"Alert: (\w+)", panel["description"])
    assert found
    name = found[1]
    sign, number = threshold(name)
    [low, high] = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert low["value"] is None
    ill = SEVERITY_COLOURS[RULES[name]["labels"]["severity"]]
    if sign == "<" or (sign, number) == ("==", 0):
        assert (low["color"], high["color"], high["value"]) == (ill, "green", 1 if sign == "==" else number)
    else:
        assert (low["color"], high["color"], high["value"]) == ("green", ill, number or 1)
    [target] = panel["targets"]
    assert set(re.findall(r"email_\w+", target["expr"])) <= set(re.findall(r"email_\w+", RULES[name]["expr"]))


def test_every_alert_with_a_number_has_its_panel() -> None:
    """But for those about a state that one panel shows for all, and those about what is not there."""
    shown = {name for panel in PANELS for name in re.findall(r"Alert: (\w+)", panel["description"])}
    assert set(RULES) - shown == {
        "EmailNoProducer",  # nothing is shown then
        "EmailMailNotFlowing",  # unfinished mails against done ones
        "EmailReauthenticationNeeded",  # the state of each mailbox
        "EmailMailboxMisconfigured",
        "EmailMailboxNeverReached",
        "EmailDaemonDown",  # Prometheus' own view
        "EmailDaemonSilent",  # daemons
    }


# what an alert says


@pytest.mark.parametrize("name", RULES)
def test_each_alert_says_what_is_wrong_and_what_to_do(name: str) -> None:
    """Severity, a line that sums it up, a command to run, and a runbook's heading of its own name."""
    rule = RULES[name]
    said = rule["annotations"]
    assert rule["labels"]["severity"] in SEVERITY_COLOURS
    assert set(said) == {"summary", "description", "runbook_url"}
    assert len(said["summary"]) <= 120
    assert re.search(r"Run: |python \S+\.py|redis-cli|Nothing to do", said["description"])
    assert said["runbook_url"] == f"docs/runbooks/troubleshooting.md#{name.lower()}"
    assert f"| {name} |" in (ROOT / "docs" / "dashboard.md").read_text()
    for script in re.findall(r"python ((?:scripts/)?\w+\.py)", said["description"]):
        assert (ROOT / script).exists(), script
