"""Paths and commands that the documents name exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.adapters.s3 import S3Settings
from pipelines.environment import RunSettings
from pipelines.feature_cache import CacheSettings
from tests.guards.closure import ROOT

DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
MAKE = re.compile(r"\bmake ((?:-\S+ )*)([a-z][a-z0-9-]*)")
TARGET = re.compile(r"^([a-z][a-z0-9-]*):", re.MULTILINE)
MADE = re.compile(
    r"^(data|models|evaluations|reports|registry|metrics|plots|mlartifacts|\.wtflow)(/|$)|^mlflow\.db$|^\.dvc/config\.local$"
)
"""What the stages make: in a fresh clone it is not there yet."""


def targets() -> set[str]:
    """What `make` knows."""
    return set(TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8")))


def repository_paths(text: str) -> set[str]:
    """Linked or backticked names that can only be paths in the repository: no command, no pattern, no URL."""
    prose = FENCE.sub("", text)
    linked = {
        link.partition("#")[0] for link in LINK.findall(prose) if "://" not in link and not link.startswith("mailto:")
    }
    top = {path.name for path in ROOT.iterdir()}
    ticked = {name for name in CODE.findall(prose) if "/" in name and name.split("/")[0] in top}
    ticked |= {name for name in CODE.findall(prose) if re.fullmatch(r"[\w.-]+\.(md|toml|yaml|yml|lock)", name)}
    found = (linked | ticked) - {""}
    return {path for path in found if not re.search(r"[<>*${}\s]|\.\.\.", path) and not MADE.search(path)}


def make_targets(text: str) -> set[str]:
    """Targets behind `make` in code: inline, or in a fenced block."""
    code = "\n".join([*CODE.findall(FENCE.sub("", text)), *FENCE.findall(text)])
    return {name for _, name in MAKE.findall(code)}


def exists(name: str, document: Path) -> bool:
    """Whether a path is there, seen from the root or from the document's folder; of `path.py:Class.method` both."""
    path, _, symbol = name.partition(":")
    found = next((base / path for base in (ROOT, document.parent) if (base / path).exists()), None)
    if found is None or not symbol:
        return found is not None
    text = found.read_text(encoding="utf-8")
    return all(re.search(rf"\b{re.escape(part)}\b", text) for part in symbol.rstrip("()").split("."))


def documents() -> list[Path]:
    return [ROOT / name for name in DOCUMENTS] + sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_document_is_there_and_names_something(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert repository_paths(text), f"{name} names no path of the repository"


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_and_targets_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert [name for name in sorted(repository_paths(text)) if not exists(name, document)] == []
    assert make_targets(text) - targets() == set()


def test_the_guard_sees_what_it_should() -> None:
    text = (
        "See `wtflow/flow/path.py`, `wtflow/gone.py`, [the tour](docs/gone.md#here), [site](https://a.b/c),\n"
        "`a/b` rates, `data/raw/<line>`, `models/x` and `params.yaml`; type `make repro` or `make -s fly`.\n"
        "```\nmake serve\nmake nothing\ntests/gone.py\n```\n"
    )
    assert repository_paths(text) == {"wtflow/flow/path.py", "wtflow/gone.py", "docs/gone.md", "params.yaml"}
    assert make_targets(text) == {"repro", "fly", "serve", "nothing"}
    assert {"repro", "serve", "test", "check"} <= targets()
    readme = ROOT / "README.md"
    assert exists("wtflow/flow/solver.py:euler", readme)
    assert not exists("wtflow/gone.py", readme)
    assert not exists("wtflow/flow/solver.py:heun", readme)


def described_keys(text: str) -> set[str]:
    """Keys of params.yaml in the first cells of a document's tables; `.other` stands for the key before it, but for
    its last part."""
    found: set[str] = set()
    for row in re.findall(r"^\| (`[a-z]+\..*?) \|", text, re.MULTILINE):
        names = CODE.findall(row)
        group = names[0].rpartition(".")[0]
        found |= {group + name if name.startswith(".") else name for name in names}
    return found


def keys(values: dict[str, Any], before: str = "") -> set[str]:
    """Of nested settings, with dots."""
    return {
        key
        for name, value in values.items()
        for key in (keys(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}"})
    }


def test_every_key_of_params_is_described() -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    del params["fetch"], params["lines"]
    space = params["tune"].pop("space")
    params["tune"]["space"] = {"<key>": {name: "" for domain in space.values() for name in domain}}
    described = described_keys((ROOT / "docs/data-contracts.md").read_text(encoding="utf-8"))
    assert keys(params) - described == set()


def test_every_variable_of_the_environment_is_in_its_table() -> None:
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^\| `(WTFLOW_[A-Z0-9_]+)` \|", text, re.MULTILINE))
    sources = [*ROOT.glob("[a-z]*/**/*.py"), *ROOT.glob("infra/*.yaml"), ROOT / "Makefile"]
    read = re.compile(r"(?:environ(?:\.get\(|\[)|\$\{|\$\()\"?(?:or \$\()?(WTFLOW_[A-Z0-9_]+)")
    named = {name for path in sources for name in read.findall(path.read_text(encoding="utf-8"))}
    assert {"WTFLOW_KILLS", "WTFLOW_UID", "WTFLOW_VENV", "WTFLOW_SHARED_DATA"} <= named
    settings = {f"WTFLOW_{name.upper()}" for name in (*RunSettings.model_fields, *CacheSettings.model_fields)}
    settings |= {f"WTFLOW_S3_{name.upper()}" for name in S3Settings.model_fields}
    assert (named | settings) - described == set()


def test_every_target_is_in_the_help() -> None:
    described = set(re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert described == targets()
