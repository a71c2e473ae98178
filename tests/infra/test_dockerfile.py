"""A lint of infra/Dockerfile: it is built nowhere here, so at least what can be read off it is checked."""

import re
from pathlib import Path

import pytest

from tests.guards.closure import ROOT

DOCKERFILE = ROOT / "infra" / "Dockerfile"
SECRET = re.compile(r"(?i)(password|secret|token|access_key)[a-z_]*\s*[=:]\s*\S")
PINNED = re.compile(r"[\w./-]+:\d[\w.-]*|[\w./-]+@sha256:[0-9a-f]{64}")
LOGIN = re.compile(r"echo 'export PATH=/opt/wtflow/bin:\$PATH' > /etc/profile\.d/\w+\.sh")
"""Debian's /etc/profile sets PATH anew, and reads these files then."""
STAGES = ("tracker", "wtflow")
"""Those that run somewhere; others only hand on files."""


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) a line, comments and line breaks taken out."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    return [
        (name.upper(), rest) for name, _, rest in (line.strip().partition(" ") for line in joined.splitlines()) if name
    ]


def stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage, those of the stages it builds on before its own."""
    found: dict[str, list[tuple[str, str]]] = {}
    own: list[tuple[str, str]] = []
    for name, rest in instructions(text):
        if name == "FROM":
            image, _, stage = re.sub(r"(?i)\s+as\s+", " ", rest).partition(" ")
            own = found[stage] = [*found.get(image, [])]
        own.append((name, rest))
    return found


def faults(text: str) -> list[str]:
    """What is wrong with a Dockerfile."""
    found = []
    arguments = dict(rest.split("=", 1) for name, rest in instructions(text) if name == "ARG" and "=" in rest)
    known = set(stages(text))
    for name, rest in instructions(text):
        if name == "FROM":
            image = re.sub(r"\$\{(\w+)\}", lambda match: arguments.get(match[1], ""), rest.split()[0])
            if image not in known and not PINNED.fullmatch(image):
                found.append(f"base {image!r} is not pinned")
        if name in ("ENV", "ARG") and SECRET.search(rest):
            found.append(f"a secret in {name} {rest}")
        if name == "RUN" and "pip install" in rest and "-r " not in rest and not re.search(r"==\d", rest):
            found.append(f"not pinned: {rest}")
        if name == "RUN" and "apt-get install" in rest and "rm -rf /var/lib/apt/lists" not in rest:
            found.append("apt lists are left")
        if name == "ADD":
            found.append("ADD: use COPY")
    for stage in STAGES:
        own = stages(text).get(stage, [])
        users = [rest for name, rest in own if name == "USER"]
        if not users or users[-1].split(":")[0] in ("root", "0"):
            found.append(f"{stage} runs as root")
        if not any(LOGIN.fullmatch(rest) for name, rest in own if name == "RUN"):
            found.append(f"{stage}: a login shell, as of Ray's launcher, does not find ray")
        found += [f"{stage} has no {wanted}" for wanted in ("HEALTHCHECK", "CMD") if wanted not in dict(own)]
    return found


def test_no_fault() -> None:
    text = DOCKERFILE.read_text()
    assert faults(text) == []
    (copied,) = [rest for name, rest in instructions(text) if name == "COPY" and "requirements" in rest]
    assert copied.startswith("requirements.lock")


@pytest.mark.parametrize(
    ("found", "instead", "fault"),
    [
        ("python:3.11.7-slim-bookworm", "python:latest", "base 'python:latest' is not pinned"),
        ("python:3.11.7-slim-bookworm", "python", "base 'python' is not pinned"),
        ("USER 10001\nWORKDIR /app", "USER root\nWORKDIR /app", "wtflow runs as root"),
        ("USER 10001\nWORKDIR /home/wtflow", "WORKDIR /home/wtflow", "tracker runs as root"),
        ("ENV PYTHONPATH=/app", "ENV AWS_SECRET_ACCESS_KEY=abc", "a secret in ENV AWS_SECRET_ACCESS_KEY=abc"),
        ("psycopg2-binary==2.9.13", "psycopg2-binary", "not pinned: "),
        ("    && rm -rf /var/lib/apt/lists/* \\\n", "", "apt lists are left"),
        ("COPY --chown", "ADD --chown", "ADD: use COPY"),
        ("/etc/profile.d", "/etc", "wtflow: a login shell"),
        ("HEALTHCHECK", "LABEL", "wtflow has no HEALTHCHECK"),
    ],
)
def test_the_lint_sees_what_it_should(found: str, instead: str, fault: str) -> None:
    text = DOCKERFILE.read_text()
    assert found in text
    assert any(one.startswith(fault) for one in faults(text.replace(found, instead)))


def test_the_image_holds_no_data_and_no_secret() -> None:
    left_out = Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines()
    assert {".git", "data", "models", "infra/secrets", ".dvc/config.local", "**/*.env", "mlflow.db*"} <= set(left_out)
    assert {"/infra/secrets/", "*.env"} <= set((ROOT / ".gitignore").read_text().splitlines())
