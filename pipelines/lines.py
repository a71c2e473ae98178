"""The product lines of params.yaml, and the typed settings of one stage for one line.

A stage's settings are the root section of its name with the line's own section laid over it:
`train: {epochs: 12}` and `lines.solar-mono.train: {epochs: 20}` train solar-mono for 20 epochs.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from wtflow.errors import WTFlowError
from wtflow.params import Section, merged

PARAMS_FILE = Path("params.yaml")
LINE_STAGES = ("prepare", "extract", "train", "evaluate", "register")
SECTIONS = ("fetch", "lines", *LINE_STAGES, "tune")
LINE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
NAME_RULE = "a line's name is 1 to 50 lower-case letters, digits and inner hyphens"

S = TypeVar("S", bound=Section)


def read_yaml(path: Path) -> Any:
    """A file of settings, as DVC reads it: YAML 1.2."""
    try:
        return YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WTFlowError(f"{path}: not found. Run from the folder that holds params.yaml and dvc.yaml.") from None
    except UnicodeDecodeError as error:
        raise WTFlowError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from None
    except YAMLError as error:
        remedy = " A backslash belongs in single quotes: '(part\\d+)_'." if "escape character" in str(error) else ""
        raise WTFlowError(f"{path}: not valid YAML: {error}{remedy}") from None


def read_params(path: Path = PARAMS_FILE) -> Mapping[str, Any]:
    """The whole of params.yaml, its sections, line names and their sections checked."""
    params = read_yaml(path)
    if not isinstance(params, Mapping) or not isinstance(params.get("lines"), Mapping) or not params["lines"]:
        raise WTFlowError(
            f"{path}: needs a section `lines` with at least one product line. See docs/data-contracts.md."
        )
    if unknown := [str(section) for section in params if section not in SECTIONS]:
        raise WTFlowError(f"{path}: unknown section {', '.join(unknown)}. Known: {', '.join(SECTIONS)}.")
    for section, values in params.items():
        _check_settings(path, section, values)
    for line, sections in params["lines"].items():
        _check_line(path, line, sections)
    return params


def is_line_name(name: str) -> bool:
    """Whether it is one: see `NAME_RULE`."""
    return LINE_NAME.fullmatch(name) is not None and len(name) <= 50


def _check_settings(path: Path, section: str, values: object) -> None:
    if values is not None and not isinstance(values, Mapping):
        raise WTFlowError(
            f"{path}: {section} holds {values!r}, not settings. Write them as name: value, or leave {{}}."
        )


def _check_line(path: Path, line: object, sections: object) -> None:
    if isinstance(line, int | float) and not isinstance(line, bool):
        raise WTFlowError(f"{path}: lines.{line}: YAML takes this name for a number. Put it in quotes: '{line}'")
    if not isinstance(line, str) or not is_line_name(line):
        raise WTFlowError(f"{path}: lines.{line}: {NAME_RULE}. Rename it.")
    empty = ", ".join(f"{stage}: {{}}" for stage in LINE_STAGES)
    if not isinstance(sections, Mapping) or set(sections) != set(LINE_STAGES):
        raise WTFlowError(
            f"{path}: lines.{line}: needs exactly the sections {', '.join(LINE_STAGES)}; "
            f"one without overrides is empty. Start from: {line}: {{{empty}}}"
        )
    for stage, values in sections.items():
        _check_settings(path, f"lines.{line}.{stage}", values)


def known_line(params: Mapping[str, Any], line: str) -> None:
    """Raise, naming the known ones, when `line` is not a product line."""
    if line not in params["lines"]:
        raise WTFlowError(
            f"{PARAMS_FILE}: no line {line!r} under `lines`. Known: {', '.join(params['lines'])}. "
            "Add it there (docs/data-contracts.md says how)."
        )


def line_params(line: str, stage: str, section: type[S], path: Path = PARAMS_FILE) -> S:
    """Settings of `stage` for `line`, validated as `section`."""
    params = read_params(path)
    known_line(params, line)
    override = params["lines"][line][stage] or {}
    values = merged(params.get(stage) or {}, override)
    return section.parse(values, where=f"{path}: {stage} (with lines.{line}.{stage})")


def fetch_params(line: str, section: type[S], path: Path = PARAMS_FILE) -> S:
    """Where the raw images of `line` come from: `fetch.<line>`, validated as `section`."""
    params = read_params(path)
    known_line(params, line)
    sources = params.get("fetch") or {}
    if line not in sources:
        raise WTFlowError(
            f"{path}: no `fetch.{line}`: this line's images are yours to bring. "
            f"Copy them to data/raw/{line}/ and type: dvc add data/raw/{line}"
        )
    return section.parse(sources[line], where=f"{path}: fetch.{line}")
