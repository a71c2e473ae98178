"""The HTTP contract. Knows neither Ray nor the registry: give it a `ScoringService`."""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.refusal import (
    Refusal,
    internal,
    not_ready,
    overloaded,
    slow_body,
    too_many_bytes,
    unsupported_content_type,
)
from serving.schema import Alive, ErrorReply, LineInfo, LineList, Ready, ScoreQuery, ScoreReply
from serving.service import ScoringService

logger = logging.getLogger(__name__)

IMAGE_TYPES = ("image/png", "image/jpeg", "image/bmp", "image/tiff", "image/webp", "application/octet-stream")
UNTOLD_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")
"""Content types that say nothing: the last is what `curl --data-binary` sends unless told otherwise."""
DESCRIPTION = {
    404: "No such line; the remedy lists the known ones.",
    408: "The body did not come in time.",
    413: "Too many bytes or too many pixels.",
    415: "Not an image, an unsupported format, or a Content-Type that is not an image's.",
    422: "No image, a truncated one, one too small, or a query parameter that is not known.",
    500: "A fault of the service; a retry is safe.",
    503: "The line's model is not loaded, or too many requests wait for it.",
}
PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'"
)
"""What a browser lets the page do: ask this service, and show the photographs that it was given."""
BINARY = {"type": "string", "format": "binary"}
SCORE_BODY = {
    "requestBody": {
        "required": True,
        "description": "One PNG, JPEG, BMP, TIFF or WebP file. Its bytes decide, not its declared type.",
        "content": {media_type: {"schema": BINARY} for media_type in IMAGE_TYPES},
    }
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorReply, "description": DESCRIPTION[status]} for status in statuses}


@dataclass(frozen=True)
class BodyLimits:
    """What a request may take of the process that reads it."""

    most_bytes: int
    """Longest body."""
    seconds: float
    """For the whole body to come."""
    at_once: int
    """Requests that are read or scored at a time; further ones are told 503, so that probes are answered."""


def create_app(service: ScoringService, limits: BodyLimits) -> FastAPI:
    """The application over `service`. Every reply that is not 2xx has the body of `ErrorReply`."""
    app = FastAPI(
        title="WT-Flow",
        description="Visual inspection: score a photograph against what is normal for its product line.",
        redirect_slashes=False,
        responses={"default": {"model": ErrorReply, "description": "Any other refusal."}},
    )
    _add_page(app)
    _add_health(app, service)
    _add_lines(app, service, limits)
    _add_errors(app)
    return app


def _add_page(app: FastAPI) -> None:
    page = PAGE.read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})


def _add_health(app: FastAPI, service: ScoringService) -> None:
    @app.get("/healthz", tags=["health"], summary="Does the process answer?")
    async def healthz() -> Alive:
        return Alive()

    @app.get("/readyz", tags=["health"], summary="Is every line's model loaded?", responses=_errors(503))
    async def readyz() -> Ready:
        lines = await service.lines()
        missing = [line for line, info in lines.items() if info is None]
        if missing:
            raise not_ready(missing)
        return Ready(lines=list(lines))


def _add_lines(app: FastAPI, service: ScoringService, limits: BodyLimits) -> None:
    at_once = asyncio.Semaphore(limits.at_once)

    @app.get("/v1/lines", tags=["lines"], summary="Every line and the model it is served with")
    async def lines() -> LineList:
        found = await service.lines()
        return LineList(
            lines=[info for info in found.values() if info is not None],
            not_ready=[line for line, info in found.items() if info is None],
        )

    @app.get("/v1/lines/{line}", tags=["lines"], summary="One line", responses=_errors(404, 503))
    async def line_info(line: str) -> LineInfo:
        return await service.info(line)

    @app.post(
        "/v1/lines/{line}/score",
        tags=["score"],
        summary="Score one photograph",
        openapi_extra=SCORE_BODY,
        responses=_errors(404, 408, 413, 415, 422, 500, 503),
    )
    async def score(line: str, request: Request, query: Annotated[ScoreQuery, Query()]) -> ScoreReply:
        service.require(line)
        if at_once.locked():
            raise overloaded(line)
        async with at_once:
            try:
                image = await asyncio.wait_for(_image_bytes(request, limits.most_bytes), limits.seconds)
            except TimeoutError:
                raise slow_body(limits.seconds) from None
            return await service.score(line, image, heatmap=query.heatmap is not None)


async def _image_bytes(request: Request, limit: int) -> bytes:
    """The whole body, unless its type or its length, declared or real, is refused first."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in UNTOLD_TYPES and not content_type.startswith("image/"):
        raise unsupported_content_type(content_type)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_many_bytes(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_many_bytes(limit)
    return bytes(body)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        return _json(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        return _json(Refusal(422, "invalid_request", found, "The one query parameter is ?heatmap=png; see /docs."))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path}: {error.detail}"
        refusal = Refusal(error.status_code, code, message, "POST /v1/lines/{line}/score scores an image; see /docs.")
        return _json(refusal, dict(error.headers or {}))

    app.add_middleware(Unexpected)


def _json(refusal: Refusal, headers: dict[str, str] | None = None) -> JSONResponse:
    headers = {**(headers or {}), **({"Retry-After": "1"} if refusal.status == 503 else {})}
    return JSONResponse(refusal.reply.model_dump(), refusal.status, headers)


class Unexpected:
    """Turns an exception that nobody expected into a logged 500 with the usual body and no traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except ClientDisconnect:
            logger.info("%s: the client left before its body was read", scope.get("path"))
        except Exception:
            if scope["type"] != "http" or started:
                raise
            logger.exception("%s %s failed", scope.get("method"), scope.get("path"))
            await _json(internal())(scope, receive, send)
