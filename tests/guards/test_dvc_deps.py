"""What DVC is told about a stage is what the stage reads: no change is missed, and none reruns too much."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.lines import LINE_STAGES
from tests.guards.closure import ROOT, closure, imported, module_file

DECLARED: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
STAGES: dict[str, dict[str, Any]] = {name: stage["do"] for name, stage in DECLARED.items() if "do" in stage}
CODE: dict[str, dict[str, Any]] = {name: stage for name, stage in DECLARED.items() if "do" not in stage}
READ_AT_RUN_TIME = {
    "evaluate": {"pipelines/report.html.j2"},
    # MLflow keeps a copy of this file in the registry and runs it there
    "register": closure("pipelines.adapters.pyfunc_model"),
}
"""Files that no import statement names."""
SHOWN_ALONE = {"prepare": {"train", "lines.${key}.train"}}
"""Settings that a stage reads to tell a person something: nothing that it writes depends on them (a test of the stage
checks), so a change of them does not run it again."""


def paths(entries: list[Any]) -> list[str]:
    """`deps` and `outs` may be strings, or mappings of a string to its options."""
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def files(paths: list[str]) -> list[str]:
    """Source files: a folder stands for all that are in it. DVC leaves out what .dvcignore names."""
    found = []
    for path in paths:
        if not (ROOT / path).is_dir():
            found.append(path)
            continue
        inside = {str(file.relative_to(ROOT)) for file in (ROOT / path).rglob("*") if file.is_file()}
        found += sorted(file for file in inside if "__pycache__" not in file and not file.endswith("__init__.py"))
    return found


def settings_read(stage: str) -> set[str]:
    """Sections of params.yaml that a stage asks for, as dvc.yaml has to name them."""
    found: set[str] = set()
    for file in sorted(closure(f"pipelines.{stage}") - {"pipelines/lines.py"}):
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id == "line_params":
                assert isinstance(node.args[1], ast.Constant), f"{file}: line_params with a computed stage"
                found |= {str(node.args[1].value), f"lines.${{key}}.{node.args[1].value}"}
            elif node.func.id == "fetch_params":
                found.add("fetch.${key}")
            assert node.func.id != "read_params", f"{file}: reads the whole of params.yaml"
    return found


def test_every_stage_has_a_module_and_the_other_way_round() -> None:
    modules = {
        path.stem
        for path in (ROOT / "pipelines").glob("*.py")
        if "pipelines.stage" in imported(path) | {name.rpartition(".")[0] for name in imported(path)}
    }
    assert set(STAGES) == modules == {"fetch", *LINE_STAGES}
    for name, stage in STAGES.items():
        assert stage["cmd"] == f"python -m pipelines.{name} '${{key}}'"


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_files_that_the_stage_imports(stage: str) -> None:
    assert module_file(f"pipelines.{stage}") is not None
    listed = files(paths(CODE[f"code-{stage}"]["deps"]))
    wanted = closure(f"pipelines.{stage}") | READ_AT_RUN_TIME.get(stage, set())
    assert len(listed) == len(set(listed))
    assert (set(listed) - wanted, wanted - set(listed)) == (set(), set()), "too many, too few"
    assert all((ROOT / path).is_file() for path in listed)


@pytest.mark.parametrize("stage", STAGES)
def test_a_line_s_stage_depends_on_the_digests_of_its_code(stage: str) -> None:
    digests = f"data/code/{stage}.json"
    assert CODE[f"code-{stage}"]["cmd"] == f"python -m pipelines.code_digests {stage}"
    assert CODE[f"code-{stage}"]["outs"] == [digests]
    assert [path for path in paths(STAGES[stage]["deps"]) if path.startswith("data/code/")] == [digests]
    assert set(CODE) == {f"code-{stage}" for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_settings_that_the_stage_reads(stage: str) -> None:
    shown = SHOWN_ALONE.get(stage, set())
    assert set(STAGES[stage]["params"]) | shown == settings_read(stage)
    assert not set(STAGES[stage]["params"]) & shown


def test_data_that_a_stage_needs_is_what_another_makes() -> None:
    made = [
        path
        for stage in (*STAGES.values(), *CODE.values())
        for kind in ("outs", "metrics")
        for path in paths(stage.get(kind, []))
    ]
    needed = {path for stage in STAGES.values() for path in paths(stage["deps"])}
    assert len(made) == len(set(made))
    assert needed <= set(made)


def test_training_sees_nothing_of_the_test_split() -> None:
    assert paths(STAGES["train"]["deps"]) == ["data/features/${key}/fit", "data/code/train.json"]
    literals = {
        node.value
        for file in closure("pipelines.train")
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert "test" not in literals
    assert not any(Path(text).name == "test" for text in literals if "\n" not in text)


@pytest.mark.parametrize("package", ["wtflow", "pipelines", "serving"])
def test_package_files_are_empty(package: str) -> None:
    """A re-export would make every stage depend on every file."""
    found = sorted((ROOT / package).rglob("__init__.py"))
    assert found
    assert [str(path) for path in found if path.read_bytes()] == []
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert folders == {path.parent for path in found}
