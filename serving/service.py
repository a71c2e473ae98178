"""All lines of one service, wherever each of them runs."""

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Protocol, TypeVar

from serving.refusal import Refusal, not_ready, unknown_line
from serving.schema import LineInfo, ScoreReply

T = TypeVar("T")


class Scorer(Protocol):
    """One line: `scorer.LineScorer` in this process, `deployment.RemoteScorer` in others."""

    async def info(self) -> LineInfo:
        """What the line is served with."""
        ...

    async def score(self, image: bytes, heatmap: bool) -> ScoreReply:
        """Verdict on the bytes of one image. Raises `Refusal`."""
        ...


class ScoringService:
    """Finds the scorer of a line and does not wait for one for ever."""

    def __init__(self, scorers: Mapping[str, Scorer], reply_timeout_s: float = 60.0, probe_timeout_s: float = 2.0):
        self._scorers = dict(sorted(scorers.items()))
        self._reply_timeout_s, self._probe_timeout_s = reply_timeout_s, probe_timeout_s

    def require(self, line: str) -> Scorer:
        """The line's scorer; a `Refusal` with 404 that lists the known lines."""
        if line not in self._scorers:
            raise unknown_line(line, list(self._scorers))
        return self._scorers[line]

    async def score(self, line: str, image: bytes, heatmap: bool) -> ScoreReply:
        """Verdict on the bytes of one image. Raises `Refusal`."""
        return await self._answer(line, self.require(line).score(image, heatmap), self._reply_timeout_s)

    async def info(self, line: str) -> LineInfo:
        """What the line is served with. Raises `Refusal`."""
        return await self._answer(line, self.require(line).info(), self._probe_timeout_s)

    async def lines(self) -> dict[str, LineInfo | None]:
        """Every line; None for one that is not loaded or does not answer."""
        answers = await asyncio.gather(*(self._info_or_none(line) for line in self._scorers))
        return dict(zip(self._scorers, answers, strict=True))

    async def _info_or_none(self, line: str) -> LineInfo | None:
        try:
            return await self.info(line)
        except Refusal:
            return None

    async def _answer(self, line: str, answer: Awaitable[T], timeout_s: float) -> T:
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            raise not_ready([line]) from None
