import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import preset
from pipelines.lines import line_params
from tests.guards.closure import ROOT
from wtflow.errors import WTFlowError
from wtflow.features.extract import ExtractParams
from wtflow.params import merged
from wtflow.training import TrainParams

NAMES = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))
LINES = ("solar-mono", "solar-poly")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository's settings and presets, in a folder of their own that is the current one."""
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    monkeypatch.chdir(tmp_path)
    for line in LINES:
        preset.write(line, {**read(tmp_path)["lines"][line], "extract": {}, "train": {}})
    return tmp_path


def read(project: Path) -> dict[str, Any]:
    params: dict[str, Any] = yaml.safe_load((project / "params.yaml").read_text())
    return params


def comments(project: Path) -> list[str]:
    return [line.partition("#")[2] for line in (project / "params.yaml").read_text().splitlines() if "#" in line]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("name", NAMES)
def test_the_line_gets_the_preset_and_nothing_else_changes(project: Path, name: str, line: str) -> None:
    before, remarks = read(project), comments(project)
    preset.main(line, name)
    after, wanted = read(project), yaml.safe_load((ROOT / "presets" / f"{name}.yaml").read_text())
    assert {stage: after["lines"][line][stage] for stage in wanted} == wanted
    assert after | {"lines": {}} == before | {"lines": {}}
    assert {key: value for key, value in after["lines"].items() if key != line} == {
        key: value for key, value in before["lines"].items() if key != line
    }
    assert comments(project) == remarks
    assert line_params(line, "train", TrainParams) == TrainParams.parse(
        merged(before["train"], wanted.get("train", {})), "expected"
    )
    assert line_params(line, "extract", ExtractParams) == ExtractParams.parse(
        merged(before["extract"], wanted.get("extract", {})), "expected"
    )


@pytest.mark.parametrize("line", LINES)
def test_default_takes_every_preset_away_to_the_letter(project: Path, line: str) -> None:
    before = (project / "params.yaml").read_bytes()
    for name in NAMES:
        preset.main(line, name)
    preset.main(line, "default")
    assert (project / "params.yaml").read_bytes() == before


def test_what_a_line_has_of_its_own_stays(project: Path) -> None:
    text = (project / "params.yaml").read_text()
    own = "{prepare: {}, extract: {batch_size: 4}, train: {calibration: {target_fpr: 0.02}, epochs: 3}, "
    text = text.replace("  solar-mono: {prepare: {}, extract: {}, train: {}, ", f"  solar-mono: {own}")
    (project / "params.yaml").write_text(text)
    for name in ("accurate", "paper", "default"):
        preset.main("solar-mono", name)
        line = read(project)["lines"]["solar-mono"]
        assert (line["extract"]["batch_size"], line["train"]["calibration"]) == (4, {"target_fpr": 0.02})
    assert line["extract"] == {"batch_size": 4}
    assert line["train"] == {"calibration": {"target_fpr": 0.02}}


def test_it_says_what_changed_and_what_to_type(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset.main("solar-mono", "edge")
    preset.main("solar-mono", "accurate")
    said = capsys.readouterr().out
    assert "+ extract.backbone.image_size: [192, 192]" in said
    assert "+ extract.backbone.mirrored: true" in said
    assert "- train.velocity.depth: 1" in said
    assert "dvc repro register@solar-mono" in said
    preset.main("solar-mono", "accurate")
    assert "nothing to change" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train: {epochs: many}", r"train\)\.epochs: .*many"),
        ("train: {epoch: 3}", r"train\)\.epoch: Extra"),
        ("train: {fusion: {levels: [1]}}", r"not all in extract\.backbone\.levels"),
        ("evaluate: {gallery: 1}", r"bad\.yaml: holds a mapping of extract and train"),
        ("train: {epochs: [3", r"bad\.yaml: not valid YAML"),
        ("train: 3", r"bad\.yaml: train"),
    ],
)
def test_a_wrong_preset_is_refused_and_writes_nothing(project: Path, text: str, reason: str) -> None:
    before = (project / "params.yaml").read_bytes()
    (project / "presets" / "bad.yaml").write_text(text)
    with pytest.raises(WTFlowError, match=reason):
        preset.main("solar-mono", "bad")
    assert (project / "params.yaml").read_bytes() == before
    assert [path.name for path in project.iterdir() if "tmp" in path.name] == []


def test_an_unknown_line_and_preset_are_named_with_the_known_ones(project: Path) -> None:
    with pytest.raises(WTFlowError, match="Known: solar-mono, solar-poly"):
        preset.main("moon", "edge")
    with pytest.raises(WTFlowError, match="Known: default, accurate, edge, paper"):
        preset.main("solar-mono", "best")


def test_a_line_that_cannot_be_changed_by_itself_is_refused_and_nothing_is_written(project: Path) -> None:
    path = project / "params.yaml"
    shared = "  solar-mono: &same {prepare: {}, extract: {}, train: {epochs: 3}, evaluate: {}, register: {}}\n"
    rows = path.read_text().splitlines(keepends=True)
    number = next(number for number, row in enumerate(rows) if row.startswith("  solar-mono: {prepare"))
    rows[number : number + 2] = [shared, "  solar-poly: {<<: *same, prepare: {}}\n"]
    before = "".join(rows)
    path.write_text(before)
    with pytest.raises(WTFlowError, match=r"params\.yaml: lines\.solar-mono shares settings"):
        preset.main("solar-mono", "edge")
    assert path.read_text() == before
    assert [found.name for found in project.iterdir() if "tmp" in found.name] == []


def test_comments_within_a_line_stay(project: Path) -> None:
    path = project / "params.yaml"
    own = "  solar-mono:\n    prepare: {}\n    extract: {}\n    train:\n      # a long day\n      epochs: 3\n"
    own += "      calibration: {target_fpr: 0.02}   # as agreed\n    evaluate: {}\n    register: {}\n"
    rows = path.read_text().splitlines(keepends=True)
    number = next(number for number, row in enumerate(rows) if row.startswith("  solar-mono: {prepare"))
    rows[number] = own
    path.write_text("".join(rows))
    preset.main("solar-mono", "edge")
    text = path.read_text()
    assert "      calibration: {target_fpr: 0.02}   # as agreed\n" in text
    assert read(project)["lines"]["solar-mono"]["train"]["velocity"] == {"width": 56, "depth": 1}
