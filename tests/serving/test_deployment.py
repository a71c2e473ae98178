import asyncio
import subprocess
import sys
from collections.abc import Coroutine
from typing import Any, cast

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serving import deployment
from serving.deployment import RemoteScorer
from serving.refusal import Refusal
from serving.schema import LineInfo
from serving.scorer import LoadedLine
from serving.service import ScoringService

FULL, DEAD = BackPressureError(64, 64), RayActorError()
SILENT = None


class Handle:
    """In the place of Serve's: its calls end as listed, one after the other. What a full queue and a dead replica do
    at which moment is not for a test to say."""

    def __init__(self, *ends: LineInfo | Refusal | Exception | None) -> None:
        self.ends = list(ends)

    def options(self, method_name: str) -> "Handle":
        return self

    def remote(self, *arguments: object) -> Coroutine[Any, Any, LineInfo | Refusal]:
        return self._ended(self.ends.pop(0))

    async def _ended(self, end: LineInfo | Refusal | Exception | None) -> LineInfo | Refusal:
        if isinstance(end, LineInfo | Refusal):
            return end
        if end is SILENT:
            await asyncio.Event().wait()
        assert end is not None
        raise end


def told(*ends: LineInfo | Refusal | Exception | None, score_first: bool = False) -> list[bool]:
    """Whether the line is ready, asked until the ends are used up; after one photograph if `score_first`."""

    async def answers() -> list[bool]:
        handle = Handle(*ends)
        scorer = RemoteScorer("line-a", cast(DeploymentHandle, handle))
        service = ScoringService({"line-a": scorer}, probe_timeout_s=0.2)
        if score_first:
            with pytest.raises(Refusal):
                await service.score("line-a", b"", heatmap=False)
        ready = []
        while handle.ends:
            ready.append((await service.lines())["line-a"] is not None)
        return ready

    return asyncio.run(answers())


@pytest.fixture
def info(loaded: dict[str, LoadedLine], monkeypatch: pytest.MonkeyPatch) -> LineInfo:
    """What the line says. A busy one is waited for 0.05 s."""
    monkeypatch.setattr(deployment, "PATIENCE_S", 0.05)
    return loaded["line-a"].info


def test_a_line_that_is_busy_is_ready(info: LineInfo) -> None:
    assert told(info, FULL, SILENT, info) == [True, True, True, True]


def test_a_line_that_never_answered_is_not_ready(info: LineInfo) -> None:
    assert told(FULL, SILENT, info) == [False, False, True]


def test_a_line_that_answered_long_ago_is_not_ready(info: LineInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "LATELY_S", 0.0)
    assert told(info, SILENT, info) == [True, False, True]


def test_a_line_whose_replica_died_is_not_ready_until_it_answers(info: LineInfo) -> None:
    """Not even if its queue is full meanwhile: of requests that wait for the next replica."""
    assert told(info, DEAD, DEAD, SILENT, FULL, info, FULL) == [True, False, False, False, True, True]
    assert told(info, DEAD, SILENT, info) == [True, False, True]
    assert told(info, DeploymentUnavailableError(None), SILENT, info) == [True, False, False, True]


def test_a_photograph_is_an_answer_too_but_does_not_tell_what_the_line_is(info: LineInfo) -> None:
    assert told(Refusal(422, "empty", "no image", "send one"), SILENT, info, SILENT, score_first=True) == [
        False,
        True,
        True,
    ]


@pytest.mark.slow
def test_only_replicas_import_torch() -> None:
    """A process with torch holds several hundred MB more; neither the gateway nor the starter needs it."""
    code = "import sys, serving.app, serving.deployment; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
