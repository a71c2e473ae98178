"""A bundle behind MLflow's pyfunc API. MLflow keeps this file beside the bundle and runs it to load the model."""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from wtflow.bundle import load_bundle
from wtflow.data.images import decode


class WTFlowModel(PythonModel):  # type: ignore[misc]
    """Column `image` (bytes of a photograph) -> score, p_value, threshold, is_anomalous."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the bundle; every file's digest is checked."""
        self.detector = load_bundle(Path(context.artifacts["bundle"])).detector()

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row a photograph, in the order given. An unreadable one raises `ImageError`."""
        verdicts = [
            self.detector.verdicts([decode(bytes(data), self.detector.limits)])[0] for data in model_input["image"]
        ]
        return pd.DataFrame(
            {
                "score": [verdict.score for verdict in verdicts],
                "p_value": [verdict.p_value for verdict in verdicts],
                "threshold": [verdict.threshold for verdict in verdicts],
                "is_anomalous": [verdict.is_anomalous for verdict in verdicts],
            }
        )


mlflow.models.set_model(WTFlowModel())
