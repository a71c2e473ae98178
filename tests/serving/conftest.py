from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.scorer import LoadedLine, loaded_line
from tests.serving.lines import write_line
from wtflow.bundle import load_bundle

LINES = {"line-a": 0, "line-b": 1}
"""Seeds of the two lines that the tests serve."""


@pytest.fixture(scope="session", autouse=True)
def _quiet_mlflow() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        patch.setenv("DO_NOT_TRACK", "true")
        yield


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundle folder by line."""
    root = tmp_path_factory.mktemp("bundles")
    for line, seed in LINES.items():
        write_line(root / line, seed)
    return {line: root / line for line in LINES}


@pytest.fixture(scope="session")
def loaded(bundles: dict[str, Path]) -> dict[str, LoadedLine]:
    """The lines ready to score, as version 3 of their models."""
    return {line: loaded_line(load_bundle(path), line, f"wtflow-{line}", 3) for line, path in bundles.items()}
