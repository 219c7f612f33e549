"""Serve YAMLs in `cluster`, standalone or inside a manifest: accepted by Serve's schema and by the typed config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve_app.config import AppConfig

CLUSTER = Path(__file__).parents[2] / "cluster"
ON_KUBERNETES = CLUSTER / "kuberay" / "rayservice.yaml"
APPLICATIONS = [*sorted(CLUSTER.glob("app*.yaml")), ON_KUBERNETES]
ONE_NODE = {1: 8, 2: 4, 4: 2, 8: 1}


def serve_config(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text())
    if path == ON_KUBERNETES:
        content = yaml.safe_load(content["spec"]["serveConfigV2"])
    assert isinstance(content, dict)
    return content


def app_config(path: Path) -> AppConfig:
    (application,) = serve_config(path)["applications"]
    return AppConfig.model_validate(application["args"])


@pytest.mark.parametrize("path", APPLICATIONS, ids=lambda path: path.name)
def test_it_is_a_serve_config_of_our_application(path: Path) -> None:
    content = serve_config(path)
    ServeDeploySchema.model_validate(content)
    (application,) = content["applications"]
    assert application["import_path"] == "serve_app.app:build"
    assert content["proxy_location"] == "Disabled"
    assert {override["name"] for override in application.get("deployments", ())} <= {"Engine", "Gateway"}
    assert app_config(path).engine.kv_cache_dtype == "kvarn_k4v2_g128"


@pytest.mark.parametrize(("workers", "engines"), ONE_NODE.items())
def test_eight_gpus_are_all_used(workers: int, engines: int) -> None:
    engine = app_config(CLUSTER / f"app-8gpu-tp{workers}.yaml").engine
    assert (engine.tensor_parallel_size, engine.num_replicas) == (workers, engines)


@pytest.mark.parametrize("path", APPLICATIONS, ids=lambda path: path.name)
def test_only_what_is_guarded_listens_beyond_its_node(path: Path) -> None:
    gateway = app_config(path).gateway
    if {gateway.host, gateway.http.host} - {"127.0.0.1"}:
        assert gateway.security.tls
        assert gateway.security.api_keys
