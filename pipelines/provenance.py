"""Where a result comes from: the commit of the code, the versions of the libraries."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import yaml

from wtflow.artefact import sha256_file

LIBRARIES = ("torch", "timm", "numpy", "pillow", "safetensors")


def code_commit(paths: Sequence[str]) -> str:
    """The last commit that changed any of `paths`, with `+changes` behind it when they differ from it on disk.

    Not simply HEAD: a commit that leaves the code alone (new data, a new dvc.lock) must not change a bundle's digest.
    `unknown` outside a git checkout.
    """
    try:
        commit = _git("log", "-1", "--format=%H", "--", *paths)
        changed = _git("status", "--porcelain", "--", *paths)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return (commit or "uncommitted") + ("+changes" if changed else "")


def stage_sources(stage: str, root: Path = Path()) -> list[str]:
    """The source files of a stage as `root`/dvc.yaml lists them, from `root`; a folder stands for the files in it."""
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    found: list[str] = []
    for dep in stages[f"code-{stage}"]["deps"]:
        inside = sorted((root / dep).glob("**/*.py"))
        found += [str(path.relative_to(root)) for path in inside] or [dep]
    return found


def stage_code(stage: str, root: Path = Path()) -> dict[str, str]:
    """SHA-256 of each of them."""
    return {path: sha256_file(root / path) for path in stage_sources(stage, root)}


def library_versions() -> dict[str, str]:
    """Python and the libraries that touch the numbers."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
