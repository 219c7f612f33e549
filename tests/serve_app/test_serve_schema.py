"""What Serve refuses or ignores around our settings is found before a cluster starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.app import build
from serve_app.config import AppConfig
from serve_app.launch import LaunchError, check_schema, read_app
from serve_app.serve_schema import check_schema as check_content
from tests.support.live import APP_YAML

DEPLOYMENTS = ("Engine", "Gateway")


def content(top: dict[str, Any], application: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load(APP_YAML.read_text())
    made["applications"][0].update(application)
    return {**made, **top}


@pytest.mark.parametrize(
    ("application", "problem"),
    [
        ({"name": 3}, "applications.0.name: Input should be a valid string"),
        ({"name": ""}, "applications: Application names must be nonempty."),
        ({"args": None}, "applications.0.args: Input should be a valid dictionary"),
        ({"host": "127.0.0.1"}, 'Host "127.0.0.1" is set in the config for application `kvarn`'),
        ({"route_prefix": "x"}, "applications.0.route_prefix is 'x': give null, or a path that begins with"),
        ({"route_prefix": "/x/"}, "applications.0.route_prefix is '/x/': "),
        ({"route_prefix": "/{x}"}, "applications.0.route_prefix is '/{x}': "),
        ({"runtime_env": "x"}, "applications.0.runtime_env: Input should be a valid dictionary"),
        (
            {"runtime_env": {"pipp": ["x"]}},
            "applications.0.runtime_env.pipp: Serve has no such key (did you mean 'pip'?), expected one of ",
        ),
        ({"runtime_env": {"env_vars": {"A": 1}}}, "applications.0.runtime_env: "),
        (
            {"runtime_env": {"working_dir": "."}},
            "applications.0.runtime_env: runtime_envs in the Serve config",
        ),
        (
            {"deployments": ["Engine"]},
            "applications.0.deployments.0 is 'Engine': give a mapping with the name",
        ),
        ({"deployments": [{}]}, "applications.0.deployments.0.name is required: add it"),
        (
            {"deployments": [{"name": "Engines"}]},
            "applications.0.deployments.0.name is 'Engines' (did you mean 'Engine'?), expected one of Engine, ",
        ),
        (
            {"deployments": [{"name": "Engine", "foo": 1}]},
            "applications.0.deployments.0.foo: Serve has no such",
        ),
        (
            {"deployments": [{"name": "Gateway", "ray_actor_options": {"num_cpu": 1}}]},
            "applications.0.deployments.0.ray_actor_options.num_cpu: Serve has no such key (did you mean 'num_",
        ),
        (
            {"arg": {}},
            "applications.0.arg: Serve has no such key (did you mean 'args'?), expected one of args, ",
        ),
    ],
)
def test_an_application_that_serve_does_not_take_is_refused(
    application: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        check_content(content({}, application), DEPLOYMENTS)


@pytest.mark.parametrize(
    ("top", "problem"),
    [
        ({"http_options": {"foo": 1}}, "http_options.foo: Serve has no such key, expected one of host, "),
        ({"http_options": {"port": "x"}}, "http_options.port: Input should be a valid integer"),
        ({"grpc_options": {"ports": 1}}, "grpc_options.ports: Serve has no such key (did you mean 'port'?)"),
        ({"logging_config": {"log_level": "LOUD"}}, 'logging_config.log_level: Got "LOUD" for log_level.'),
        ({"target_capacity": 200}, "target_capacity: Input should be less than or equal to 100"),
    ],
)
def test_options_that_serve_does_not_take_are_refused(top: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        check_content(content(top, {}), DEPLOYMENTS)


@pytest.mark.parametrize(
    "application",
    [
        {"route_prefix": "/"},
        {"route_prefix": "/kvarn"},
        {"runtime_env": {"env_vars": {"A": "1"}, "pip": ["x"]}},
        {
            "deployments": [
                {"name": "Gateway", "num_replicas": 2, "ray_actor_options": {"resources": {"g": 1}}}
            ]
        },
        {
            "deployments": [
                {"name": "Engine", "autoscaling_config": {"max_replicas": 2}, "user_config": {"a": 1}}
            ]
        },
    ],
)
def test_what_serve_takes_is_left_alone(application: dict[str, Any]) -> None:
    given = content({"http_options": {"port": 8001}}, application)
    before = yaml.safe_dump(given)
    check_content(given, DEPLOYMENTS)
    assert yaml.safe_dump(given) == before


@pytest.mark.parametrize("is_split", [False, True])
def test_the_deployments_are_those_that_the_application_has(tmp_path: Path, is_split: bool) -> None:
    store = {"directory": str(tmp_path / "store"), "capacity_gib": 1}
    args: dict[str, Any] = {"engine": {"kv_cache_memory_gib": 1}}
    if is_split:
        args = {"engine": {"kv_cache_memory_gib": 1, "shared_store": store}, "disaggregation": {}}
    gateway = build(AppConfig.model_validate(args))._bound_deployment
    bound = (*gateway.init_args, *gateway.init_kwargs.values())
    names = {
        gateway.name,
        *(one._bound_deployment.name for one in bound if hasattr(one, "_bound_deployment")),
    }
    path = tmp_path / "app.yaml"
    path.write_text(yaml.safe_dump(content({}, {"args": args, "deployments": [{"name": "Nope"}]})))
    with pytest.raises(LaunchError, match=f"expected one of {', '.join(sorted(names))}$"):
        check_schema(read_app(path))
