"""The dashboard and the alert rules: every metric and label in them exists, and every alert has its way out."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from config.sources import ROOT
from tests.app.conftest import application
from tests.app.metrics.conftest import Promtool
from tests.app.scripted_pool import ScriptedPool

ALERTS = ROOT / "config" / "prometheus" / "alerts.yml"
SCRAPE = ROOT / "config" / "prometheus" / "scrape.yml"
DASHBOARD = ROOT / "config" / "grafana" / "tailrace.json"
OPERATIONS = ROOT / "docs" / "operations.md"

# Prometheus's own labels.
ADDED = {"instance", "job", "le"}


@pytest.fixture
def known(runtime: Path, pool: ScriptedPool) -> dict[str, set[str]]:
    """Every metric by the names of its samples, with its labels."""
    with application(runtime) as app:
        client: FlaskClient = app.test_client()
        client.get("/livez")
        text = client.get("/metrics").text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return list(group["rules"])


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    found += [each["expr"] for each in dashboard["annotations"]["list"]]
    return [*found, *(rule["expr"] for rule in alerts())]


def test_every_metric_of_dashboard_and_alerts_exists_with_its_labels(known: dict[str, set[str]]):
    used = 0
    for expression in expressions():
        for name, selector in re.findall(r"(tailrace:\w+)(\{[^}]*\})?", expression):
            used += 1
            assert name in known, expression
            for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector):
                assert label in known[name] | ADDED, expression
    assert used > 60


def test_values_of_labels_in_the_alerts_exist(runtime: Path, pool: ScriptedPool):
    with application(runtime) as app:
        text = app.test_client().get("/metrics").text
    for rule in alerts():
        for label, values in re.findall(r'\b(cause|state|name)=~?"([^"]+)"', rule["expr"]):
            for value in values.split("|"):
                assert f'{label}="{value}"' in text, rule["alert"]


def test_promtool_takes_the_rules(promtool: Promtool):
    done = promtool("check", "rules", ALERTS)
    assert done.returncode == 0, done.stderr
    assert f"{len(alerts())} rules found" in done.stdout


def test_promtool_takes_the_dashboards_expressions(promtool: Promtool, tmp_path: Path):
    plain = [
        each.replace("$__rate_interval", "1m").replace("$instance", ".*")
        for each in (target["expr"] for panel in panels() for target in panel["targets"])
    ]
    rules = [{"record": f"dashboard:{number}", "expr": each} for number, each in enumerate(plain)]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = promtool("check", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_scrape_sample(promtool: Promtool, tmp_path: Path):
    sample = SCRAPE.read_text().replace("/etc/prometheus", str(tmp_path))
    (tmp_path / "tailrace.key").write_text("sk-x")
    (tmp_path / "rules" / "tailrace").mkdir(parents=True)
    (tmp_path / "rules" / "tailrace" / "alerts.yml").write_text(ALERTS.read_text())
    file = tmp_path / "prometheus.yml"
    file.write_text(sample)
    done = promtool("check", "config", file)
    assert done.returncode == 0, done.stdout + done.stderr


# What is on the wire, and which alerts that is a reason for: a minute a value.
CASES: list[tuple[str, dict[str, str], list[str]]] = [
    ("a pool that is gone", {"tailrace:up": "0x10"}, ["TailracePoolDown"]),
    ("a pool that answers", {"tailrace:up": "1x10"}, []),
    ("not ready", {"tailrace:ready": "0x10", "tailrace:draining": "0x10"}, ["TailraceNotReady"]),
    ("not ready, but about to stop", {"tailrace:ready": "0x10", "tailrace:draining": "1x10"}, []),
    ("a death", {"tailrace:worker_deaths_total": "0 0 0 0 0 1 1 1 1 1 1"}, ["TailraceModelWorkerDies"]),
    ("no death", {"tailrace:worker_deaths_total": "3x10"}, []),
    ("a hung worker", {'tailrace:worker_state{engine="0",state="hung"}': "1x10"}, ["TailraceModelWorkerGone"]),
    (
        "a full queue",
        {"tailrace:num_requests_waiting": "90x10", 'tailrace:limit{name="max_queue"}': "100x10"},
        ["TailraceQueueFills"],
    ),
    (
        "a queue with room",
        {"tailrace:num_requests_waiting": "70x10", 'tailrace:limit{name="max_queue"}': "100x10"},
        [],
    ),
    (
        "slow first tokens",
        {
            'tailrace:time_to_first_token_seconds_bucket{le="10.0"}': "0+1x20",
            'tailrace:time_to_first_token_seconds_bucket{le="20.0"}': "0+10x20",
            'tailrace:time_to_first_token_seconds_bucket{le="+Inf"}': "0+10x20",
        },
        ["TailraceFirstTokenSlow"],
    ),
    ("wrong keys", {'tailrace:requests_refused_total{cause="key"}': "0+120x20"}, ["TailraceWrongKeys"]),
    ("invalid requests", {'tailrace:requests_refused_total{cause="invalid"}': "0+120x20"}, []),
]


@pytest.mark.parametrize(("series", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_alerts_fire_when_they_should(promtool: Promtool, tmp_path: Path, series: dict[str, str], expected: list[str]):
    def labelled(name: str) -> str:
        head, _, rest = name.partition("{")
        return f'{head}{{job="tailrace",instance="a",model_name="m"' + (f",{rest}" if rest else "}")

    names = [rule["alert"] for rule in alerts()]
    length = "20m" if any("x20" in values for values in series.values()) else "10m"
    fired = [{"eval_time": length, "alertname": name, "exp_alerts": []} for name in names if name not in expected]
    unit: dict[str, Any] = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": labelled(name), "values": values} for name, values in series.items()],
                "alert_rule_test": fired,
            }
        ],
    }
    file = tmp_path / "test.yml"
    file.write_text(json.dumps(unit))
    silent = promtool("test", "rules", file)
    assert silent.returncode == 0, silent.stdout + silent.stderr
    if expected:
        # The other way about: that they are silent is not true.
        unit["tests"][0]["alert_rule_test"] = [
            {"eval_time": length, "alertname": name, "exp_alerts": []} for name in expected
        ]
        file.write_text(json.dumps(unit))
        assert promtool("test", "rules", file).returncode != 0


def test_every_alert_says_what_to_do():
    text = OPERATIONS.read_text(encoding="utf-8")
    headings = {line.removeprefix("### ").lower() for line in text.splitlines() if line.startswith("### ")}
    for rule in alerts():
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["alert"].lower() in headings


def test_the_dashboard_is_one():
    dashboard = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one in range(len(places)):
        for other in range(one):
            a, b = places[one], places[other]
            apart = a["x"] >= b["x"] + b["w"] or b["x"] >= a["x"] + a["w"]
            assert apart or a["y"] >= b["y"] + b["h"] or b["y"] >= a["y"] + a["h"]
    assert all(target["legendFormat"] or panel["type"] == "stat" for panel in panels() for target in panel["targets"])
