"""The files of infra/: against Ray's own schemas where it ships them, against lists of keys where it does not.

Nothing here asks a Kubernetes API server or a cloud: what these files do there has not been tried.
"""

import copy
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from pipelines.environment import RunSettings
from serving.settings import PREFIX, ServeSettings
from tests.guards.closure import ROOT
from wtflow.errors import WTFlowError

INFRA = ROOT / "infra"
KUBERAY = sorted((INFRA / "kuberay").glob("ray*.yaml"))
PINNED = re.compile(r"[\w./-]+:[\w.-]*\d[\w.-]*")
SECRET = re.compile(r"(?i)password|secret|token|access_key")

KEYS: dict[str, set[str]] = {
    "RayCluster": {
        "rayVersion", "authOptions", "gcsFaultToleranceOptions", "enableInTreeAutoscaling", "autoscalerOptions",
        "headGroupSpec", "workerGroupSpecs", "suspend", "headServiceAnnotations",
    },
    "RayJob": {
        "entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit",
        "submissionMode", "runtimeEnvYAML", "rayClusterSpec", "jobId", "metadata", "suspend", "clusterSelector",
        "submitterPodTemplate", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources",
    },
    "RayService": {
        "serveConfigV2", "upgradeStrategy", "rayClusterConfig", "serveService", "excludeHeadPodFromServeSvc",
        "rayClusterDeletionDelaySeconds",
    },
    "headGroupSpec": {"rayStartParams", "template", "serviceType", "headService", "enableIngress", "resources"},
    "workerGroupSpec": {
        "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template", "numOfHosts", "suspend",
        "idleTimeoutSeconds", "scaleStrategy", "resources",
    },
    "autoscalerOptions": {
        "idleTimeoutSeconds", "upscalingMode", "resources", "image", "imagePullPolicy", "env", "envFrom", "version",
        "volumeMounts", "securityContext",
    },
    "pod": {
        "containers", "initContainers", "volumes", "securityContext", "tolerations", "nodeSelector", "affinity",
        "serviceAccountName", "imagePullSecrets", "priorityClassName", "terminationGracePeriodSeconds",
        "enableServiceLinks",
    },
    "container": {
        "name", "image", "imagePullPolicy", "command", "args", "env", "envFrom", "ports", "resources", "volumeMounts",
        "securityContext", "lifecycle", "livenessProbe", "readinessProbe", "startupProbe", "workingDir",
    },
    "metadata": {"name", "namespace", "labels", "annotations"},
    "template": {"metadata", "spec"},
}  # fmt: skip
"""Of ray.io/v1 and of the pods in it: those that a manifest here may use."""
CLUSTER_IN = {"RayCluster": None, "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}


def cluster_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The RayCluster spec inside."""
    place = CLUSTER_IN[manifest["kind"]]
    found: dict[str, Any] = manifest["spec"] if place is None else manifest["spec"][place]
    return found


def faults(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a ray.io manifest."""
    kind, spec = manifest["kind"], manifest["spec"]
    cluster = cluster_of(manifest)
    found = [*unknown(kind, spec), *unknown("RayCluster", cluster), *unknown("metadata", manifest["metadata"])]
    if manifest["apiVersion"] != "ray.io/v1":
        found.append("apiVersion")
    if cluster["rayVersion"] != ray.__version__:
        found.append(f"rayVersion {cluster['rayVersion']}, the lock has {ray.__version__}")
    found += unknown("autoscalerOptions", cluster.get("autoscalerOptions", {}))
    groups = [("headGroupSpec", cluster["headGroupSpec"])]
    groups += [("workerGroupSpec", one) for one in cluster["workerGroupSpecs"]]
    for name, group in groups:
        found += [
            *unknown(name, group),
            *unknown("template", group["template"]),
            *pod_faults(group["template"]["spec"]),
        ]
        if not all(isinstance(value, str) for value in group["rayStartParams"].values()):
            found.append("rayStartParams: texts only")
        if name == "workerGroupSpec" and not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            found.append("replicas")
    return found


def pod_faults(pod: dict[str, Any]) -> list[str]:
    """What is wrong with a pod's spec."""
    found = unknown("pod", pod)
    if not pod.get("securityContext", {}).get("runAsNonRoot"):
        found.append("runs as root")
    if pod.get("enableServiceLinks") is not False:
        found.append("takes a Service's variables for settings")
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        found += unknown("container", container)
        found += [f"no volume {one['name']}" for one in container["volumeMounts"] if one["name"] not in volumes]
        if not PINNED.fullmatch(container["image"]):
            found.append(f"image {container['image']} is not pinned")
        resources = container["resources"]
        if resources["requests"] != resources["limits"]:
            found.append("requests are not limits: Ray would count what it does not have")
        found += [f"a secret written out: {one['name']}" for one in container["env"] if is_secret(one)]
    return found


def is_secret(variable: Mapping[str, Any]) -> bool:
    """A name that means one, with a value instead of a reference."""
    return bool(SECRET.search(variable["name"])) and "secretKeyRef" not in variable.get("valueFrom", {})


def unknown(kind: str, values: Mapping[str, Any]) -> list[str]:
    """Keys that a kind does not have."""
    return [f"{kind} has no {key}" for key in values if key not in KEYS[kind]]


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_kuberay(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    assert faults(manifest) == []
    cluster = cluster_of(manifest)
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["authOptions"] == {"mode": "token"}
    (claim,) = yaml.safe_load_all((INFRA / "kuberay/storage.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        claims = [one["persistentVolumeClaim"] for one in group["template"]["spec"]["volumes"] if "emptyDir" not in one]
        assert claims == [{"claimName": claim["metadata"]["name"]}]
    gpus = [
        group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        for group in cluster["workerGroupSpecs"]
    ]
    assert gpus == ([None] if manifest["kind"] == "RayService" else ["1"])


def test_there_is_one_of_each_kind() -> None:
    assert {yaml.safe_load(path.read_text())["kind"] for path in KUBERAY} == set(CLUSTER_IN)


def _gpu(manifest: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = cluster_of(manifest)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    return container


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda m: m["spec"].update(shutDownAfterJobFinishes=True), "RayJob has no shutDownAfterJobFinishes"),
        (lambda m: cluster_of(m).update(rayVersion="2.9.0"), "rayVersion 2.9.0"),
        (lambda m: cluster_of(m).update(workerGroups=[]), "RayCluster has no workerGroups"),
        (lambda m: _gpu(m).update(image="wtflow:latest"), "image wtflow:latest is not pinned"),
        (lambda m: _gpu(m)["resources"]["requests"].update(cpu="1"), "requests are not limits"),
        (lambda m: _gpu(m)["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"}), "a secret written out"),
        (lambda m: _gpu(m)["volumeMounts"].append({"name": "data", "mountPath": "/d"}), "no volume data"),
        (lambda m: _gpu(m).update(resource={}), "container has no resource"),
        (lambda m: cluster_of(m)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "rayStartParams"),
        (lambda m: cluster_of(m)["workerGroupSpecs"][0].update(replicas=99), "replicas"),
        (lambda m: cluster_of(m)["headGroupSpec"]["template"]["spec"].pop("securityContext"), "runs as root"),
    ],
)
def test_a_broken_manifest_is_seen(spoil: Callable[[dict[str, Any]], object], fault: str) -> None:
    manifest = yaml.safe_load((INFRA / "kuberay/rayjob.yaml").read_text())
    spoil(manifest)
    assert any(one.startswith(fault) for one in faults(manifest))


def test_the_service_s_config_is_ray_serve_s() -> None:
    text = yaml.safe_load((INFRA / "kuberay/rayservice.yaml").read_text())["spec"]["serveConfigV2"]
    values = yaml.safe_load(text)
    config = ServeDeploySchema.model_validate(values)
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    builder = getattr(importlib.import_module(module), name)
    with pytest.raises(WTFlowError, match="takes no args, found lines"):
        builder({"lines": "solar-mono"})
    broken = copy.deepcopy(values)
    broken["applications"][0]["import_path"] = "serving"
    with pytest.raises(ValueError, match="import_path"):
        ServeDeploySchema.model_validate(broken)


def commands(text: str) -> list[str]:
    """Of a line for a shell that does one after the other."""
    return [one.strip() for one in text.split("&&")]


def test_clusters_extract_before_the_fleet_trains() -> None:
    """The fleet trains no line whose features are stale, and `dvc repro` alone trains one line after the other."""
    order = ["dvc repro extract", "python -m pipelines.fleet", "dvc repro"]
    entrypoint = yaml.safe_load((INFRA / "kuberay/rayjob.yaml").read_text())["spec"]["entrypoint"]
    told = (ROOT / "docs/operations.md").read_text()
    (launched,) = re.findall(r"^ray exec infra/ray-cluster\.yaml '(.*)'$", told, re.MULTILINE)
    composed = re.findall(r"^docker compose .* exec (.*) ray-head (.*)$", told, re.MULTILINE)
    assert commands(entrypoint)[1:4] == order
    assert commands(launched)[-3:] == order
    assert [command for _, command in composed] == order
    assert all("RAY_ADDRESS=auto" in given and "WTFLOW_THREADS=1" in given for given, _ in composed)
    assert "MLFLOW_TRACKING_URI=" in launched  # else all nodes write to one SQLite file


def test_settings_that_the_manifests_name_exist() -> None:
    """An unknown WTFLOW_SERVE_* stops the service; an unknown other one would be ignored."""
    stages = {f"WTFLOW_{name.upper()}" for name in RunSettings.model_fields}
    serving = {PREFIX + name.upper() for name in ServeSettings.model_fields}
    own = {"WTFLOW_UID", "WTFLOW_WORKER_CPUS"}  # of the compose file
    for path in [*KUBERAY, INFRA / "compose.yaml", INFRA / "ray-cluster.yaml"]:
        assert set(re.findall(r"WTFLOW_[A-Z_]+", path.read_text())) <= stages | serving | own, path


def test_the_cluster_launcher_s_file_is_ray_s() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    config = yaml.safe_load((INFRA / "ray-cluster.yaml").read_text())
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    assert any(one["resources"].get("GPU") for one in config["available_node_types"].values())
    for spoil in ({"worker_nodes": {}}, {"provider": {}}, {"available_node_types": {"gpu": {"resources": {}}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**config, **spoil}, schema)


SERVICE_KEYS = {
    "image", "build", "restart", "command", "environment", "secrets", "volumes", "ports", "healthcheck", "depends_on",
    "deploy", "profiles", "shm_size", "working_dir", "user",
}  # fmt: skip


def compose_faults(compose: dict[str, Any]) -> list[str]:
    """What is wrong with the compose file."""
    found = [
        f"top level: {key}"
        for key in compose
        if key not in ("name", "services", "secrets", "volumes") and key[:2] != "x-"
    ]
    services = compose["services"]
    for name, service in services.items():
        found += [f"{name}: unknown {key}" for key in service if key not in SERVICE_KEYS]
        if not PINNED.fullmatch(service["image"]):
            found.append(f"{name}: image {service['image']} is not pinned")
        found += [f"{name}: no secret {one}" for one in service.get("secrets", []) if one not in compose["secrets"]]
        found += [f"{name}: no service {one}" for one in service.get("depends_on", {}) if one not in services]
        found += [f"{name}: no volume {one}" for one in volumes(service) if one not in compose["volumes"]]
        found += [f"{name}: port {one} for all" for one in service.get("ports", []) if not one.startswith("127.0.0.1:")]
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable) and not str(value).startswith("/run/secrets/"):
                found.append(f"{name}: a secret written out: {variable}")
            if str(value).startswith("/run/secrets/") and Path(value).name not in service["secrets"]:
                found.append(f"{name}: {value} is not given to it")
        for other, how in service.get("depends_on", {}).items():
            known = services.get(other, {})  # an image that is built has its own
            if how["condition"] == "service_healthy" and not {"healthcheck", "build"} & set(known):
                found.append(f"{name}: {other} has no healthcheck")
    return found


def volumes(service: Mapping[str, Any]) -> Iterator[str]:
    """Names of the volumes that are no folders."""
    for one in service.get("volumes", []):
        if not one.startswith((".", "/")):
            yield one.split(":")[0]


def test_compose() -> None:
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    assert compose_faults(compose) == []
    assert {"postgres", "s3", "mlflow", "ray-head", "ray-worker", "serving"} <= set(compose["services"])
    targets = {service["build"]["target"] for service in compose["services"].values() if "build" in service}
    text = (INFRA / "Dockerfile").read_text()
    assert all(f" AS {target}\n" in text for target in targets)
    for service in compose["services"].values():
        if "build" in service:
            assert (INFRA / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file()


@pytest.mark.parametrize(
    ("service", "spoil", "fault"),
    [
        ("s3", {"image": "minio/minio:latest"}, "s3: image minio/minio:latest is not pinned"),
        ("mlflow", {"ports": ["5000:5000"]}, "mlflow: port 5000:5000 for all"),
        ("postgres", {"environment": {"POSTGRES_PASSWORD": "abc"}}, "postgres: a secret written out"),
        ("mlflow", {"depends_on": {"database": {"condition": "service_healthy"}}}, "mlflow: no service database"),
        ("serving", {"secret": []}, "serving: unknown secret"),
        ("postgres", {"volumes": ["pg:/var/lib"]}, "postgres: no volume pg"),
        ("ray-head", {"secrets": ["ray_token"]}, "ray-head: /run/secrets/aws_credentials is not given to it"),
    ],
)
def test_a_broken_compose_file_is_seen(service: str, spoil: dict[str, Any], fault: str) -> None:
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    compose["services"][service] |= spoil
    assert any(one.startswith(fault) for one in compose_faults(compose))
