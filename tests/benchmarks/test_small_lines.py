from pathlib import Path

import pytest

from benchmarks import small_lines
from benchmarks.small_lines import claims, reduced
from tests.benchmarks.place import tiny_product_line


def test_a_reduced_line_lacks_training_images_and_nothing_else(
    tiny_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_lines, "PLACE", tmp_path / "bench")
    line = tiny_product_line(tiny_features, tmp_path / "project")
    small, other = reduced(line, 5, draw=0), reduced(line, 5, draw=1)
    assert len(line.manifest.rows("train")) > 5
    assert len(small.manifest.rows("train")) == len(other.manifest.rows("train")) == 5
    assert small.manifest.rows("train") != other.manifest.rows("train")
    assert all(row in line.manifest.rows("train") for row in small.manifest.rows("train"))
    assert small.manifest.rows("calibrate", "test") == line.manifest.rows("calibrate", "test")
    assert small.train_params == line.train_params
    assert reduced(line, None, draw=0) is line


def test_the_claim_of_a_size_is_about_its_worst_line() -> None:
    rows = [
        {"line": "a", "size": 20, "wtflow": 0.9, "neighbours": 0.85},
        {"line": "b", "size": 20, "wtflow": 0.8, "neighbours": 0.82},
        {"line": "a", "size": "all", "wtflow": 0.95, "neighbours": 0.955},
    ]
    assert [(claim.value, claim.holds) for claim in claims(rows)] == [(-0.02, False), (-0.005, True)]
