"""Manifests for Kubernetes and `ray up`.

No suitable package contains KubeRay's CRDs, so the RayService is checked against the schema below: exactly the fields
of KubeRay 1.5's API that the manifest uses, so that a misspelt or misplaced field fails. Names, ports, selectors,
probes and times are checked for consistency with each other.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from serve_app.config import AppConfig

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"


def closed(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """Return the schema of an object with exactly these keys."""
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }


TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
OBJECT, LIST = {"type": "object"}, {"type": "array", "minItems": 1}
PARAMETERS = {"type": "object", "additionalProperties": TEXT}
CONTAINER = closed(
    {"name": TEXT, "image": TEXT, "resources": closed({"requests": OBJECT, "limits": OBJECT})},
    ports={"type": "array", "items": closed({"name": TEXT, "containerPort": COUNT})},
    env=LIST,
    readinessProbe=OBJECT,
    livenessProbe=OBJECT,
    volumeMounts=LIST,
)
TEMPLATE = closed(
    {
        "spec": closed(
            {
                "containers": {"type": "array", "items": CONTAINER, "minItems": 1},
                "terminationGracePeriodSeconds": COUNT,
            },
            volumes=LIST,
            topologySpreadConstraints=LIST,
        )
    },
    metadata=OBJECT,
)
WORKERS = closed(
    {
        "groupName": TEXT,
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "rayStartParams": PARAMETERS,
        "template": TEMPLATE,
    }
)
FAULT_TOLERANCE = closed({"redisAddress": TEXT, "redisPassword": closed({"valueFrom": OBJECT})})
RAY_CLUSTER = closed(
    {
        "rayVersion": TEXT,
        "headGroupSpec": closed({"rayStartParams": PARAMETERS, "template": TEMPLATE}),
        "workerGroupSpecs": {"type": "array", "items": WORKERS, "minItems": 1},
        "gcsFaultToleranceOptions": FAULT_TOLERANCE,
    },
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=closed({}, idleTimeoutSeconds=COUNT),
)
RAY_SERVICE = closed(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayService"},
        "metadata": OBJECT,
        "spec": closed(
            {"serveConfigV2": TEXT, "rayClusterConfig": RAY_CLUSTER},
            upgradeStrategy=closed(
                {"type": {"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]}}
            ),
            rayClusterDeletionDelaySeconds=COUNT,
        ),
    }
)


def documents() -> Iterator[dict[str, Any]]:
    for path in sorted(KUBERAY.glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text())


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {found["metadata"]["name"]: found for found in documents() if found["kind"] == kind}


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    return of_kind("RayService")["kvarn"]


@pytest.fixture(scope="module")
def groups(service: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}


@pytest.fixture(scope="module")
def config(service: dict[str, Any]) -> AppConfig:
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    return AppConfig.model_validate(application["args"])


def test_the_ray_service_has_the_shape_of_kuberays_api(service: dict[str, Any]) -> None:
    jsonschema.validate(service, RAY_SERVICE)


def test_the_shape_refuses_what_kuberay_would(service: dict[str, Any]) -> None:
    misspelt = json.loads(json.dumps(service))
    misspelt["spec"]["rayClusterConfig"]["headGroupSpecs"] = misspelt["spec"]["rayClusterConfig"].pop(
        "headGroupSpec"
    )
    with pytest.raises(jsonschema.ValidationError, match="headGroupSpec"):
        jsonschema.validate(misspelt, RAY_SERVICE)


def test_the_ray_of_the_cluster_is_the_ray_of_the_image(service: dict[str, Any]) -> None:
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__


def test_everything_is_in_one_namespace() -> None:
    assert {document["metadata"]["namespace"] for document in documents()} == {"kvarn"}


def labels(group: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = group["template"]["metadata"]["labels"]
    return found


def test_the_service_and_the_budgets_select_pods_that_exist(groups: dict[str, dict[str, Any]]) -> None:
    gateways, engines = labels(groups["gateways"]), labels(groups["engines"])
    assert of_kind("Service")["kvarn-gateways"]["spec"]["selector"] == gateways
    budgets = {
        name: b["spec"]["selector"]["matchLabels"] for name, b in of_kind("PodDisruptionBudget").items()
    }
    assert budgets == {"kvarn-gateways": gateways, "kvarn-engines": engines}


def test_ports_and_probes_are_the_gateways_own(groups: dict[str, dict[str, Any]], config: AppConfig) -> None:
    (container,) = groups["gateways"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert (ports["grpc"], ports["serve"]) == (config.gateway.port, config.gateway.http.port)
    ready = container["readinessProbe"]["httpGet"]
    assert (ready["path"], ready["port"], ready["scheme"]) == ("/readyz", config.gateway.http.port, "HTTPS")
    targets = {port["targetPort"] for port in of_kind("Service")["kvarn-gateways"]["spec"]["ports"]}
    assert targets == {"grpc", "serve"}


def test_every_worker_has_probes_of_its_own(groups: dict[str, dict[str, Any]]) -> None:
    """KubeRay's default readiness probe queries Serve's proxy, which is off."""
    for group in groups.values():
        for container in group["template"]["spec"]["containers"]:
            assert {"readinessProbe", "livenessProbe"} <= set(container)


def test_each_gateway_has_a_pod(
    service: dict[str, Any], groups: dict[str, dict[str, Any]], config: AppConfig
) -> None:
    assert groups["gateways"]["replicas"] == config.gateway.num_replicas
    assert json.loads(json.loads(groups["gateways"]["rayStartParams"]["resources"].strip("'"))) == {
        "gateway": 1
    }
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    (override,) = application["deployments"]
    assert override["ray_actor_options"]["resources"] == {"gateway": 1}
    assert config.engine.autoscaling is not None
    assert groups["engines"]["maxReplicas"] == config.engine.autoscaling.max_replicas


def test_pods_live_long_enough_to_drain(groups: dict[str, dict[str, Any]], config: AppConfig) -> None:
    for name, grace_s in (
        ("gateways", config.gateway.drain_grace_s),
        ("engines", config.engine.drain_grace_s),
    ):
        assert groups[name]["template"]["spec"]["terminationGracePeriodSeconds"] > grace_s


def test_files_of_the_gateways_are_mounted(groups: dict[str, dict[str, Any]], config: AppConfig) -> None:
    (container,) = groups["gateways"]["template"]["spec"]["containers"]
    mounted = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
    security = config.gateway.security
    assert security.tls is not None
    assert security.api_keys is not None
    for path in (security.tls.certificate, security.tls.private_key, security.api_keys, Path(config.model)):
        assert any(path.is_relative_to(directory) for directory in mounted)


def test_ray_up_takes_its_cluster() -> None:
    content = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    cluster = prepare_config(content)  # as `ray up` does
    validate_config(cluster)
    assert cluster["max_workers"] == len(content["provider"]["worker_ips"])
    assert "gateway" in content["worker_start_ray_commands"][-1]


def instructions() -> dict[str, list[str]]:
    """Return the arguments of the Dockerfile's instructions by kind, in order."""
    lines = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    found: dict[str, list[str]] = {}
    for kind, _, rest in (line.partition(" ") for line in lines if line and not line.startswith("#")):
        found.setdefault(kind, []).append(rest)
    return found


def test_the_image_holds_what_is_called_in_it(service: dict[str, Any]) -> None:
    """KubeRay's probes call wget; `ray up` copies files into containers with rsync, the head starts workers by SSH."""
    (system,) = (run for run in instructions()["RUN"] if "apt-get install" in run)
    assert {"wget", "rsync", "openssh-client"} <= set(system.split())
    for copied in instructions()["COPY"]:
        *sources, _ = copied.split()
        assert all((ROOT / source).exists() for source in sources)


def test_the_image_installs_extras_and_starts_a_command_that_the_project_has() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (installed,) = (run for run in instructions()["RUN"] if "pip install" in run)
    assert '".[${HARDWARE},serve]"' in installed
    assert "HARDWARE=gpu" in instructions()["ARG"]
    assert {"gpu", "cpu", "serve"} <= project["optional-dependencies"].keys()
    command, *arguments = json.loads(*instructions()["CMD"])
    assert command in project["scripts"]
    app = Path(arguments[-1]).relative_to(*instructions()["WORKDIR"][:1])
    assert app.parts[0] in " ".join(instructions()["COPY"]).split()
    assert (ROOT / app).exists()
