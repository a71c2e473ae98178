"""Puts a bundle into an MLflow registry, as the register stage does."""

import json
from pathlib import Path

import mlflow

PYFUNC = """
import mlflow
from mlflow.pyfunc import PythonModel


class Nothing(PythonModel):
    def predict(self, context, model_input, params=None):
        return model_input


mlflow.models.set_model(Nothing())
"""


def register(uri: str, line: str, bundle: Path | None, folder: Path, tags: dict[str, str] | None = None) -> int:
    """A new version of `wtflow-<line>` with the bundle among its artifacts; returns its number."""
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    if mlflow.get_experiment_by_name("wtflow") is None:
        mlflow.create_experiment("wtflow", artifact_location=(folder / "artifacts").as_uri())
    mlflow.set_experiment("wtflow")
    code = folder / "pyfunc.py"
    code.write_text(PYFUNC)
    artifacts = {} if bundle is None else {"bundle": str(bundle)}
    with mlflow.start_run():
        model = mlflow.pyfunc.log_model(
            name="model", python_model=str(code), artifacts=artifacts, pip_requirements=["mlflow"]
        )
    digest = {} if bundle is None else {"bundle_digest": json.loads((bundle / "bundle.json").read_text())["digest"]}
    return int(mlflow.register_model(model.model_uri, f"wtflow-{line}", tags={**digest, **(tags or {})}).version)


def crown(uri: str, line: str, version: int) -> None:
    """Set the alias that is served."""
    mlflow.MlflowClient(uri, uri).set_registered_model_alias(f"wtflow-{line}", "champion", str(version))
