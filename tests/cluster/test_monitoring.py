"""Prometheus rules and the Grafana dashboard name only metrics that the application exports.

`tests/e2e/test_application.py` checks that a live application exports what `serve_app.observability.metrics` lists;
here every expression is checked against that list.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.observability.metrics import ALL_METRICS, Metric, MetricKind

CLUSTER = Path(__file__).parents[2] / "cluster"
RULES = CLUSTER / "prometheus" / "rules.yaml"
DASHBOARD = CLUSTER / "grafana" / "kvarn.json"
SERVE_LABELS = {"application", "deployment", "replica"}
RAYS_OWN = {"ray_serve_deployment_replica_healthy"}
NAME = re.compile(r"(?<![\w:\"$])(?:ray_|kvarn:)[\w:]+")
GROUPING = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")
MATCHER = re.compile(r"(\w+)\s*(?:=~|!=|!~|=)\s*\"")

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool: it comes with Prometheus"
)


def series(metric: Metric) -> set[str]:
    if metric.kind is MetricKind.HISTOGRAM:
        return {f"{metric.exported}_{part}" for part in ("bucket", "sum", "count")}
    return {metric.exported}


EXPORTED = {name: metric for metric in ALL_METRICS for name in series(metric)}


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    for rule in rules():
        yield rule.get("record") or rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_every_name_and_label_is_exported(where: str, expression: str) -> None:
    names = set(NAME.findall(expression))
    assert names
    assert names <= EXPORTED.keys() | recorded() | RAYS_OWN, where
    known = SERVE_LABELS | {"le"}.union(*(EXPORTED[name].labels for name in names & EXPORTED.keys()))
    used = {label.strip() for labels in GROUPING.findall(expression) for label in labels.split(",")}
    assert used | set(MATCHER.findall(expression)) <= known, where


def test_every_metric_is_drawn_or_alerted_on() -> None:
    used = " ".join(expression for _, expression in expressions())
    assert [metric.name for metric in ALL_METRICS if metric.exported not in used] == []


def test_every_recording_is_used() -> None:
    used = " ".join(expression for _, expression in expressions())
    assert [name for name in recorded() if name not in used] == []


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def run_promtool(*arguments: object) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_prometheus_takes_the_rules_and_the_config() -> None:
    run_promtool("check", "rules", RULES)
    run_promtool("check", "config", CLUSTER / "prometheus" / "prometheus.yaml")


@promtool
def test_rules_compute_and_alerts_fire() -> None:
    run_promtool("test", "rules", RULES.with_name("rules.test.yaml"))


@promtool
def test_prometheus_parses_the_dashboards_expressions(tmp_path: Path) -> None:
    expressions = [target["expr"] for panel in panels() for target in panel["targets"]]
    plain = [text.replace("$__rate_interval", "1m").replace("$application", ".*") for text in expressions]
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(plain)]
    path = tmp_path / "dashboard.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run_promtool("check", "rules", path)
