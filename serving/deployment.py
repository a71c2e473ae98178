"""The service on Ray Serve: a gateway that speaks HTTP, and a deployment a line.

docs/adr/0004-serving-topology.md says why. torch is imported by the replicas of lines only: the gateway and the starter
of the service stay small.

    client --HTTP--> Gateway (api.create_app) --handle--> line-<name> (scorer.LineScorer, batches) --> reply
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serving import resolve
from serving.api import BodyLimits, create_app
from serving.refusal import Refusal, not_ready, overloaded
from serving.resolve import Champion
from serving.schema import LineInfo, ScoreReply
from serving.service import ScoringService
from serving.settings import ServeSettings
from wtflow.errors import ImageError, WTFlowError

if TYPE_CHECKING:
    from PIL import Image

    from wtflow.detector import Verdict

logger = logging.getLogger("ray.serve")
PATIENCE_S = 1.5
"""How long a line is asked what it serves if that is known: less than the service waits for any probe."""
LATELY_S = 10.0
"""A line that answered a call in that time, and now does not, is taken to be busy."""
PROBES = 64
"""Requests that the gateway takes beyond those that it scores: for health, and to be told that it is overloaded."""


class LineReplica:
    """A replica: one process, one line, one pinned model version, loaded before the first request."""

    def __init__(self, champion: Champion, settings: ServeSettings) -> None:
        import torch

        from serving.scorer import LineScorer

        torch.set_num_threads(settings.threads)
        loaded = resolve.load(champion)
        detector = loaded.detector

        async def judge(pictures: "list[Image.Image]") -> "list[Verdict | ImageError]":
            return await asyncio.to_thread(detector.answers, pictures)

        batched = serve.batch(
            max_batch_size=settings.max_batch_size, batch_wait_timeout_s=settings.batch_wait_ms / 1000
        )
        self._scorer = LineScorer(loaded, batched(judge))

    async def info(self) -> LineInfo:
        """What this replica serves."""
        return await self._scorer.info()

    async def score(self, image: bytes, heatmap: bool) -> ScoreReply | Refusal:
        """The reply, or the refusal as a value: an exception would arrive wrapped in Ray's own."""
        try:
            return await self._scorer.score(image, heatmap)
        except Refusal as refusal:
            return refusal


class RemoteScorer:
    """`service.Scorer` over the handle of a line's deployment."""

    def __init__(self, line: str, handle: DeploymentHandle) -> None:
        self._line, self._handle = line, handle
        self._info: LineInfo | None = None
        self._answered_at: float | None = None  # of `time.monotonic`; None also since a replica died

    async def info(self) -> LineInfo:
        """What the line is served with. Raises `Refusal`.

        Versions are pinned, so a line that is only busy is answered for: its queue, where the question waits too, is
        full or longer than `PATIENCE_S`.
        """
        known = self._info
        try:
            answer = await asyncio.wait_for(self._call("info"), None if known is None else PATIENCE_S)
        except TimeoutError:
            if known is None or self._answered_at is None or time.monotonic() - self._answered_at > LATELY_S:
                raise not_ready([self._line]) from None
            return known
        except BackPressureError:
            if known is None or self._answered_at is None:
                raise overloaded(self._line) from None
            return known
        self._info = LineInfo.model_validate(answer)
        return self._info

    async def score(self, image: bytes, heatmap: bool) -> ScoreReply:
        """Verdict on the bytes of one image. Raises `Refusal`."""
        try:
            answer = await self._call("score", image, heatmap)
        except BackPressureError:
            raise overloaded(self._line) from None
        if isinstance(answer, Refusal):
            raise answer
        return ScoreReply.model_validate(answer)

    async def _call(self, method: str, *arguments: object) -> Any:
        """One call; once more if the replica died under it, for scoring changes nothing.

        Raises `BackPressureError` if the queue is full, `Refusal` if there is no replica.
        """
        try:
            try:
                answer = await self._handle.options(method_name=method).remote(*arguments)
            except RayActorError:
                self._answered_at = None
                logger.warning("line %s: a replica died; asking another", self._line)
                answer = await self._handle.options(method_name=method).remote(*arguments)
        except (RayActorError, DeploymentUnavailableError):
            self._answered_at = None
            raise not_ready([self._line]) from None
        self._answered_at = time.monotonic()
        return answer


class Gateway:
    """The HTTP contract over the handles of all lines. Holds no model."""

    def __init__(self, lines: Mapping[str, DeploymentHandle], settings: ServeSettings, at_once: int) -> None:
        self._lines, self._settings = lines, settings
        self._limits = BodyLimits(settings.max_body_bytes, settings.body_timeout_s, at_once)

    def __serve_build_asgi_app__(self) -> FastAPI:
        scorers = {line: RemoteScorer(line, handle) for line, handle in self._lines.items()}
        service = ScoringService(scorers, self._settings.reply_timeout_s)
        return create_app(service, self._limits)


def build_application(champions: Sequence[Champion], settings: ServeSettings) -> serve.Application:
    """The Serve application for these pinned versions."""
    ongoing = 2 * settings.max_batch_size  # one batch is computed while the next is decoded
    lines = {
        champion.line: serve.deployment(LineReplica)
        .options(
            name=f"line-{champion.line}",
            num_replicas=settings.replicas,
            max_ongoing_requests=ongoing,
            max_queued_requests=settings.max_queued,
            graceful_shutdown_wait_loop_s=0.5,
            ray_actor_options={"num_cpus": settings.replica_cpus},
        )
        .bind(champion, settings)
        for champion in champions
    }
    most = len(lines) * (settings.replicas * ongoing + settings.max_queued)
    gateway = serve.deployment(serve.ingress()(Gateway)).options(
        name="gateway",
        max_ongoing_requests=most + PROBES,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 0},
    )
    return gateway.bind(lines, settings, most)


def build_champions(args: Mapping[str, str]) -> serve.Application:
    """For a Serve config file: every line that has a champion, with the settings of the environment. Takes no `args`.

    Raises `WTFlowError` where `python -m serving.app` ends with an error.
    """
    if args:
        raise WTFlowError(
            f"serving.deployment:build_champions takes no args, found {', '.join(args)}. Set WTFLOW_SERVE_*."
        )
    return build_application(resolve.champions(resolve.registry_uri()), ServeSettings.from_environment())
