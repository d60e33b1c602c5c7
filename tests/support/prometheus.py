"""A real Prometheus with the project's own configuration, and the dashboard's expressions as Grafana would send them."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.support.daemons import ROOT
from tests.support.processes import ChildProcess, free_port
from tests.support.servers import ENVIRONMENT, SEARCH_PATH
from tests.support.wait import until

CONFIG = ROOT / "config"
DASHBOARD = CONFIG / "grafana_dashboard.json"
START_TIMEOUT = 30.0
FASTER = {"scrape_interval: 15s": "scrape_interval: 1s", "evaluation_interval: 15s": "evaluation_interval: 1s"}
SOONER = {"refresh_interval: 30s": "refresh_interval: 1s"}


def have_prometheus() -> bool:
    """Are prometheus and promtool installed?"""
    return all(shutil.which(binary, path=SEARCH_PATH) for binary in ("prometheus", "promtool"))


def promtool(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """What it printed stands in `stdout`, errors too."""
    return subprocess.run(
        ["promtool", *args],
        env=ENVIRONMENT,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )


class Prometheus:
    """On a free port, by config/prometheus.yml and config/alerts.yml as they are, but for the producer's port and shorter intervals.

    `producer_port`: whom it asks for targets. Its data is in a temporary directory, which the end of the context removes.
    """

    def __init__(self, producer_port: int) -> None:
        self.port = free_port()
        self._directory = Path(tempfile.mkdtemp(prefix="prometheus-"))
        text = (CONFIG / "prometheus.yml").read_text()
        for before, after in {**FASTER, **SOONER, "127.0.0.1:8080/targets": f"127.0.0.1:{producer_port}/targets"}.items():
            assert before in text, before
            text = text.replace(before, after)
        (self._directory / "prometheus.yml").write_text(text)
        shutil.copy(CONFIG / "alerts.yml", self._directory)

    def __enter__(self) -> Self:
        binary = shutil.which("prometheus", path=SEARCH_PATH)
        assert binary is not None, "prometheus is not installed"
        argv = [binary, f"--config.file={self._directory}/prometheus.yml", f"--storage.tsdb.path={self._directory}/data"]
        argv += [f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=warn"]
        self._process = ChildProcess(argv, log=self._directory / "log", env=ENVIRONMENT, cwd=self._directory)
        until(self._ready, START_TIMEOUT, "Prometheus is ready")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def ask(self, page: str, **parameters: str | float) -> Any:
        """`data` of /api/v1/`page`. Raises AssertionError with what Prometheus says is wrong, e.g. with an expression."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{page}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {json.load(error)}") from None

    def query(self, expression: str) -> dict[str, float]:
        """An instant query: labels, as they are written in PromQL → value."""
        found = self.ask("query", query=expression)["result"]
        return {labels_of(series["metric"]): float(series["value"][1]) for series in found}

    def query_range(self, expression: str, start: float, end: float, step: float = 1.0) -> list[tuple[dict[str, str], Points]]:
        """A range query: (labels, [(unix time, value)]) a series."""
        found = self.ask("query_range", query=expression, start=start, end=end, step=step)["result"]
        return [(series["metric"], [(at, float(value)) for at, value in series["values"]]) for series in found]

    def targets(self) -> dict[str, str]:
        """host:port of what it scrapes → up, down or unknown."""
        return {target["labels"]["instance"]: target["health"] for target in self.ask("targets")["activeTargets"]}

    def _ready(self) -> bool:
        assert self._process.running(), f"Prometheus ended while starting:\n{self._process.tail()}"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, TimeoutError):
            return False


Points = list[tuple[float, float]]


def labels_of(metric: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{value}"' for name, value in sorted(metric.items()) if name != "__name__")


# the dashboard


@dataclass(frozen=True)
class Query:
    """One line of a panel. `expression`: as it stands in the dashboard. `legend`: with {{label}} in it."""

    row: str
    panel: str
    kind: str
    unit: str
    expression: str
    legend: str

    def sent(self, window: str = "10s") -> str:
        """The expression as Grafana sends it, with all values of each variable chosen. `window`: for rates."""
        text = self.expression.replace("$__rate_interval", window)
        for name in variables():
            text = text.replace(f"${name}", ".*")
        assert "$" not in text, f"no such variable: {text}"
        return text

    def name(self, labels: Mapping[str, str]) -> str:
        """The legend of a series."""
        text = self.legend
        for name, value in labels.items():
            text = text.replace(f"{{{{{name}}}}}", value)
        return text


def model() -> dict[str, Any]:
    """config/grafana_dashboard.json."""
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def variables() -> dict[str, str]:
    """Name → the query that asks for its values."""
    return {variable["name"]: variable["query"] for variable in model()["templating"]["list"]}


def queries() -> Iterator[Query]:
    """All expressions of the dashboard, in the order of its panels."""
    row = ""
    for panel in model()["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
            continue
        for target in panel["targets"]:
            unit = panel["fieldConfig"]["defaults"]["unit"]
            yield Query(row, panel["title"], panel["type"], unit, target["expr"], target["legendFormat"])
