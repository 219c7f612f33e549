"""What Serve refuses or ignores in a Serve YAML, found before a cluster starts."""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from typing import Any

from pydantic import BaseModel, ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeDeploySchema

from kvarn.errors import did_you_mean, first_problem


def check_schema(content: dict[str, Any], deployments: Collection[str]) -> None:
    """Check a Serve YAML with one application against Serve's schema.

    Args:
        content: the YAML.
        deployments: names of the application's deployments.

    Raises:
        ValueError: Serve has no such key, which it would ignore, or does not take its value.
    """
    (application,) = content["applications"]
    _check_overrides(application.get("deployments"), deployments)
    try:
        schema = ServeDeploySchema.model_validate(deepcopy(content))  # validators change what they get
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None
    _check_names("", content, schema)
    _check_route(schema.applications[0].route_prefix)
    _check_environment(schema.applications[0].runtime_env)


def _check_overrides(overrides: Any, deployments: Collection[str]) -> None:
    """Check the names of the deployments whose options the YAML overrides."""
    for index, override in enumerate(overrides if isinstance(overrides, list) else ()):
        place = f"applications.0.deployments.{index}"
        if not isinstance(override, dict):
            raise ValueError(f"{place} is {override!r}: give a mapping with the name of a deployment")
        name = override.get("name")
        if name is not None and name not in deployments:
            raise ValueError(
                f"{place}.name is {name!r}{did_you_mean(str(name), deployments)}, "
                f"expected one of {', '.join(deployments)}"
            )


def _check_names(place: str, given: Any, taken: Any) -> None:
    """Check that a model has all the keys that it was given."""
    if isinstance(given, list) and isinstance(taken, list):
        for index, (item, model) in enumerate(zip(given, taken, strict=False)):
            _check_names(f"{place}{index}.", item, model)
    if isinstance(given, dict) and isinstance(taken, BaseModel):
        known = type(taken).model_fields
        for name, value in given.items():
            if name not in known:
                _refuse_key(f"{place}{name}", str(name), known)
            _check_names(f"{place}{name}.", value, getattr(taken, name))


def _check_route(prefix: str | None) -> None:
    if prefix is None or prefix == "/":
        return
    if not prefix.startswith("/") or prefix.endswith("/") or {"{", "}"} & set(prefix):
        raise ValueError(
            f"applications.0.route_prefix is {prefix!r}: give null, or a path that begins with a slash, does not "
            "end with one and has no braces"
        )


def _check_environment(environment: dict[str, Any]) -> None:
    known = {name for name in RuntimeEnv.known_fields if not name.startswith("_")}
    for name in environment:
        if name not in RuntimeEnv.known_fields:
            _refuse_key(f"applications.0.runtime_env.{name}", str(name), known)
    try:
        RuntimeEnv(**deepcopy(environment))
    except (TypeError, ValueError) as error:
        raise ValueError(f"applications.0.runtime_env: {' '.join(str(error).split())}") from None


def _refuse_key(place: str, name: str, known: Collection[str]) -> None:
    raise ValueError(
        f"{place}: Serve has no such key{did_you_mean(name, known)}, expected one of {', '.join(sorted(known))}"
    )
