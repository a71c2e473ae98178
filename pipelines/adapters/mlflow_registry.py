"""The MLflow registry: a bundle becomes a version of `wtflow-<line>`, loadable through MLflow's pyfunc API too."""

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.adapters.tracking import find_run, flat
from wtflow.bundle import Bundle, load_bundle
from wtflow.errors import WTFlowError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
TRAINED_ON = "trained_on.json"
REQUIREMENTS = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "pyarrow",
    "safetensors",
    "pydantic",
    "pillow",
    "jaxtyping",
)


@dataclass(frozen=True)
class Registered:
    """A version of a line's model, and what its tags say."""

    version: int
    digest: str
    image_auroc: float | None
    """None where the test set has no anomalous images."""
    test_set: str
    """Digest of the test images and labels that `image_auroc` was measured on."""


def model_name(line: str) -> str:
    """Name of a line's registered model."""
    return f"wtflow-{line}"


def aliases(client: "MlflowClient", line: str) -> dict[str, int]:
    """Alias -> version; empty for a model that is not registered."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_registered_model(model_name(line)).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise
    return {alias: int(number) for alias, number in found.items()}


def registered(client: "MlflowClient", line: str, number: int) -> Registered:
    """What is known of a version."""
    return _of(client.get_model_version(model_name(line), str(number)))


def version_of(client: "MlflowClient", line: str, digest: str) -> Registered | None:
    """The version that holds the bundle `digest`, if one does."""
    found = client.search_model_versions(f"name = '{model_name(line)}' and tags.bundle_digest = '{digest}'")
    return _of(found[0]) if found else None


def _of(found: "ModelVersion") -> Registered:
    tags = found.tags
    auroc = json.loads(tags["image_auroc"])
    return Registered(int(found.version), tags["bundle_digest"], auroc, tags["test_set"])


def crown(client: "MlflowClient", line: str, version: Registered, best: float | None) -> None:
    """Give a version the alias `champion`, and note the highest AUROC of any champion on its test set: its own, `best`,
    that of the champions before it, or what is noted by now."""
    client.set_registered_model_alias(model_name(line), CHAMPION, str(version.version))
    noted = best_champion(client, line, version.test_set)
    known = [auroc for auroc in (version.image_auroc, best, noted) if auroc is not None]
    if known:
        client.set_registered_model_tag(model_name(line), _best_tag(version.test_set), json.dumps(max(known)))


def best_champion(client: "MlflowClient", line: str, test_set: str) -> float | None:
    """What `crown` noted for a test set; None before."""
    noted = client.get_registered_model(model_name(line)).tags.get(_best_tag(test_set))
    return None if noted is None else float(noted)


def _best_tag(test_set: str) -> str:
    return f"best_champion.{test_set[:12]}"


def add_version(
    client: "MlflowClient",
    experiment: str,
    bundle: Bundle,
    metrics: Mapping[str, float | int | str | None],
    report: Path,
    tags: Mapping[str, str],
    trained_on: Sequence[str],
) -> int:
    """Log the run (settings, metrics, report, bundle, the images it was trained on) and register a version with `tags`;
    returns its number."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    line = str(bundle.provenance["line"])
    found = find_run(client, experiment, bundle_digest=bundle.digest)
    run = mlflow.start_run(run_id=found, run_name=None if found else f"{line}-{bundle.digest[:12]}")
    with run, warnings.catch_warnings():
        # an example would be run through the model, and its photograph kept: the stage scores one itself
        warnings.filterwarnings("ignore", ".*An input example was not provided", UserWarning)
        mlflow.set_tags({"line": line, **tags})
        mlflow.log_params(
            {f"bundle.{key}": value for key, value in flat(bundle.config.model_dump(mode="json")).items()}
        )
        mlflow.log_metrics({key: float(value) for key, value in metrics.items() if isinstance(value, int | float)})
        mlflow.log_artifact(str(report), "report")
        mlflow.log_dict({"image_id": list(trained_on)}, TRAINED_ON)
        outputs = {"score": DataType.double, "p_value": DataType.double, "threshold": DataType.double}
        model = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"bundle": str(bundle.path)},
            code_paths=[str(Path(__file__).parents[2] / "wtflow")],
            signature=ModelSignature(
                Schema([ColSpec(DataType.binary, "image")]),
                Schema(
                    [ColSpec(kind, name) for name, kind in outputs.items()]
                    + [ColSpec(DataType.boolean, "is_anomalous")]
                ),
            ),
            pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
        )
    added = mlflow.register_model(model.model_uri, model_name(line), tags=dict(tags))
    return int(added.version)


def trained_on(client: "MlflowClient", line: str, number: int) -> list[str]:
    """The image_ids that a version was trained on. Raises `WTFlowError` if it does not say."""
    import mlflow
    from mlflow.exceptions import MlflowException

    run = client.get_model_version(model_name(line), str(number)).run_id
    try:
        return [str(image_id) for image_id in mlflow.artifacts.load_dict(f"runs:/{run}/{TRAINED_ON}")["image_id"]]
    except (MlflowException, OSError, KeyError) as error:
        raise WTFlowError(f"version {number} has another test set and does not say what it was trained on") from error


@contextmanager
def opened(line: str, number: int) -> Iterator[Bundle]:
    """The bundle of a version, downloaded for as long as it is used. Raises `WTFlowError` where it is not whole."""
    import mlflow
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(prefix="wtflow-") as folder:
        try:
            root = Path(mlflow.artifacts.download_artifacts(f"models:/{model_name(line)}/{number}", dst_path=folder))
            path = next((path.parent for path in root.rglob("bundle.json")), root)
            bundle = load_bundle(path)
        except (MlflowException, OSError) as error:
            raise WTFlowError(f"the files of version {number} did not come ({error})") from error
        except WTFlowError as error:
            said = str(error).replace(f"{path}/", "")
            raise WTFlowError(f"version {number} cannot be opened ({said})") from error
        yield bundle
