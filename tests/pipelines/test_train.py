from pathlib import Path
from typing import NoReturn

import pytest

from pipelines.environment import RunSettings
from pipelines.lines import line_params
from pipelines.train import train_line
from tests import tiny_line
from tests.pipelines.searches import write_project
from wtflow.errors import WTFlowError
from wtflow.training import TrainParams


def not_called(*_: object) -> NoReturn:
    raise AssertionError("it was trained")


def test_a_rate_that_the_calibration_images_cannot_hold_is_refused_before_training(
    tiny_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(tiny_features, tmp_path)
    monkeypatch.chdir(tmp_path)
    params = line_params(tiny_line.LINE, "train", TrainParams)
    strict = params.model_copy(update={"calibration": params.calibration.model_copy(update={"target_fpr": 0.001})})
    with pytest.raises(WTFlowError, match=r"train\.calibration\.target_fpr: 0\.001 needs at least 999 calibration"):
        train_line(tiny_line.LINE, strict, RunSettings(), not_called, lambda epoch: None)
