import asyncio
import base64
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from serving.api import IMAGE_TYPES, BodyLimits, create_app
from serving.schema import LineInfo, ScoreReply
from serving.scorer import LineScorer, LoadedLine
from serving.service import Scorer, ScoringService
from tests.serving.lines import LIMITS, encoded, picture
from wtflow.data.images import ImageLimits, decode
from wtflow.detector import Detector, Verdict
from wtflow.scoring.anomaly_map import overlay

SCORE = "/v1/lines/line-a/score"
PHOTO = encoded(picture(1))
MAX_BODY = 2_000_000


def app_over(scorers: dict[str, Scorer], **timeouts: float) -> FastAPI:
    return create_app(ScoringService(scorers, **timeouts), BodyLimits(MAX_BODY, seconds=60, at_once=64))


@pytest.fixture(scope="module")
def app(loaded: dict[str, LoadedLine]) -> FastAPI:
    return app_over({line: LineScorer(one) for line, one in loaded.items()})


async def send_all(app: FastAPI, requests: list[dict[str, Any]]) -> list[httpx.Response]:
    """All at once."""
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await asyncio.gather(*(client.request(**request) for request in requests))


def send(app: FastAPI, method: str, url: str, **options: Any) -> httpx.Response:
    return asyncio.run(send_all(app, [{"method": method, "url": url, **options}]))[0]


def assert_refused(reply: httpx.Response, status: int, code: str) -> dict[str, str]:
    """The status, the one form that every error has, and nothing empty in it."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"error"}
    error: dict[str, str] = body["error"]
    assert set(error) == {"code", "message", "remedy"}
    assert error["code"] == code
    assert error["message"]
    assert error["remedy"]
    return error


def test_the_page_asks_this_service_alone_and_what_there_is(app: FastAPI) -> None:
    """Without the internet, and under a proxy's prefix, too. What it does in a browser: test_page.py."""
    reply = send(app, "GET", "/")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "://" not in reply.text
    asked = re.findall(r"""(?:href=|src=|ask\()["`]([^"`?]+)""", reply.text)
    paths = [re.sub(r"\$\{[^}]*\}", "{line}", path) for path in asked if not path.startswith("data:")]
    assert sorted(paths) == ["docs", "openapi.json", "v1/lines", "v1/lines/{line}/score"]
    assert {"/v1/lines", "/v1/lines/{line}/score"} <= set(app.openapi()["paths"])
    fields = set(re.findall(r"(?:said|one)\.([a-z_]+)", reply.text)) - {"error"}
    assert {"score", "heatmap", "threshold"} <= fields
    assert fields <= {*ScoreReply.model_fields, *LineInfo.model_fields}


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_reply_is_the_offline_verdict(app: FastAPI, loaded: dict[str, LoadedLine], file_format: str) -> None:
    body = encoded(picture(2), file_format)
    reply = send(app, "POST", SCORE, content=body)
    detector = loaded["line-a"].detector
    verdict = detector.verdicts([decode(body, LIMITS)])[0]
    assert reply.status_code == 200
    assert reply.json() == {
        "line": "line-a",
        "model_version": 3,
        "bundle_digest": loaded["line-a"].info.bundle_digest,
        "score": verdict.score,
        "p_value": verdict.p_value,
        "threshold": detector.calibration.threshold,
        "is_anomalous": verdict.is_anomalous,
        "needs_review": False,
        "heatmap": None,
    }


def test_lines_have_their_own_models(app: FastAPI) -> None:
    a, b = (send(app, "POST", f"/v1/lines/{line}/score", content=PHOTO).json() for line in ("line-a", "line-b"))
    assert (a["line"], b["line"]) == ("line-a", "line-b")
    assert a["bundle_digest"] != b["bundle_digest"]
    assert a["score"] != b["score"]


def test_same_bytes_same_reply(app: FastAPI) -> None:
    replies = [send(app, "POST", f"{SCORE}?heatmap=png", content=PHOTO).content for _ in range(2)]
    assert replies[0] == replies[1]


@pytest.mark.parametrize(
    "content_type",
    [None, "application/octet-stream", "application/x-www-form-urlencoded", "image/jpeg", "IMAGE/PNG; charset=binary"],
)
def test_bytes_decide_not_the_declared_type(app: FastAPI, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    assert send(app, "POST", SCORE, content=PHOTO, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "content_type", ["application/json", "multipart/form-data; boundary=x", "text/plain", "text/html", "images/png"]
)
def test_other_content_types_are_refused(app: FastAPI, content_type: str) -> None:
    reply = send(app, "POST", SCORE, content=PHOTO, headers={"Content-Type": content_type})
    assert "curl --data-binary" in assert_refused(reply, 415, "unsupported_content_type")["remedy"]


def test_heatmap_lies_over_the_upright_photograph(app: FastAPI, loaded: dict[str, LoadedLine]) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    body = encoded(picture(3, width=90, height=50), "JPEG", exif=turned)
    reply = send(app, "POST", f"{SCORE}?heatmap=png", content=body)
    image = Image.open(BytesIO(base64.b64decode(reply.json()["heatmap"], validate=True)))
    assert image.format == "PNG"
    assert image.size == (50, 90)
    detector, original = loaded["line-a"].detector, decode(body, LIMITS)
    verdict = detector.verdicts([original])[0]
    expected = overlay(original, verdict.anomaly_map, detector.calibration.pixel_threshold)
    assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 422, "empty"),
        (b"hello, this is not an image", 415, "not_an_image"),
        (b"GIF89a" + bytes(100), 415, "not_an_image"),
        (PHOTO[: len(PHOTO) // 2], 422, "truncated"),
        (encoded(picture(1), "JPEG")[:-200], 422, "truncated"),
        (PHOTO[:20], 422, "truncated"),
        (encoded(picture(1, width=15)), 422, "too_small"),
        (encoded(Image.new("RGB", (1001, 1000))), 413, "too_many_pixels"),
        (encoded(Image.new("RGB", (600, 600)), "BMP"), 413, "too_many_bytes"),
        (bytes(MAX_BODY + 1), 413, "too_many_bytes"),
    ],
)
def test_bad_image(app: FastAPI, body: bytes, status: int, code: str) -> None:
    assert_refused(send(app, "POST", SCORE, content=body), status, code)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_unknown_line_names_the_known(app: FastAPI, method: str) -> None:
    url = "/v1/lines/line-x" + ("/score" if method == "POST" else "")
    error = assert_refused(
        send(app, method, url, content=b"not an image" if method == "POST" else None), 404, "unknown_line"
    )
    assert "line-a, line-b" in error["remedy"]


@pytest.mark.parametrize("query", ["heatmap=jpg", "heatmap=", "heatmap=PNG", "heat_map=png"])
def test_unknown_query(app: FastAPI, query: str) -> None:
    reply = send(app, "POST", f"{SCORE}?{query}", content=PHOTO)
    assert "?heatmap=png" in assert_refused(reply, 422, "invalid_request")["remedy"]


def test_routes_that_are_not_there(app: FastAPI) -> None:
    assert_refused(send(app, "GET", "/v2/lines"), 404, "not_found")
    reply = send(app, "GET", SCORE)
    assert_refused(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"


async def first_reply(app: FastAPI, headers: dict[str, str], chunks: list[bytes]) -> tuple[int, int]:
    """Status, and how many of `chunks` the application asked for before it answered."""
    sent: list[dict[str, Any]] = []
    asked = 0

    async def receive() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return {"type": "http.request", "body": chunks[asked - 1], "more_body": asked < len(chunks)}

    async def reply(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": SCORE,
        "raw_path": SCORE.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    await app(scope, receive, reply)
    return sent[0]["status"], asked


def test_declared_length_is_refused_unread(app: FastAPI) -> None:
    headers = {"content-length": str(MAX_BODY + 1)}
    assert asyncio.run(first_reply(app, headers, [bytes(1000)])) == (413, 0)


def test_undeclared_length_is_refused_while_reading(app: FastAPI) -> None:
    chunks = [bytes(MAX_BODY // 4)] * 40
    assert asyncio.run(first_reply(app, {}, chunks)) == (413, 5)


def test_streamed_body_is_put_together(app: FastAPI) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(PHOTO), 100):
            yield PHOTO[start : start + 100]

    whole, streamed = (send(app, "POST", SCORE, content=content) for content in (PHOTO, pieces()))
    assert streamed.json() == whole.json()


def test_bad_images_among_good_ones_fail_alone(app: FastAPI, loaded: dict[str, LoadedLine]) -> None:
    bodies = [encoded(picture(seed)) if seed % 3 else PHOTO[:50] for seed in range(12)]
    replies = asyncio.run(send_all(app, [{"method": "POST", "url": SCORE, "content": body} for body in bodies]))
    detector = loaded["line-a"].detector
    for body, reply in zip(bodies, replies, strict=True):
        if body == PHOTO[:50]:
            assert_refused(reply, 422, "truncated")
        else:
            assert reply.json()["score"] == detector.verdicts([decode(body, LIMITS)])[0].score


def test_loop_stays_free_while_a_large_photograph_is_decoded(loaded: dict[str, LoadedLine]) -> None:
    """A ticker on the service's loop never waits for as long as the decoding takes."""
    line = loaded["line-a"]
    patient = LoadedLine(replace(line.detector, limits=ImageLimits()), line.info)
    app = app_over({"line-a": LineScorer(patient)})
    body = encoded(Image.new("RGB", (7000, 7000), (90, 120, 60)), "JPEG")
    gaps: list[float] = []

    async def ticker() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - before)

    async def both() -> float:
        ticking = asyncio.create_task(ticker())
        await asyncio.sleep(0.01)
        start = time.perf_counter()
        (reply,) = await send_all(app, [{"method": "POST", "url": SCORE, "content": body, "timeout": 60}])
        assert reply.status_code == 200
        ticking.cancel()
        return time.perf_counter() - start

    duration = asyncio.run(both())
    assert max(gaps) < duration / 2


class Noting(Detector):
    """A detector that notes the threads it is asked in."""

    threads: ClassVar[set[threading.Thread]] = set()

    def verdicts(self, pictures: Sequence[Image.Image]) -> list[Verdict]:
        self.threads.add(threading.current_thread())
        return super().verdicts(pictures)


def test_inference_is_not_on_the_loop(loaded: dict[str, LoadedLine]) -> None:
    detector = loaded["line-a"].detector
    noting = Noting(detector.backbone, detector.scorer, detector.calibration, detector.limits)
    app = app_over({"line-a": LineScorer(LoadedLine(noting, loaded["line-a"].info))})
    assert send(app, "POST", SCORE, content=PHOTO).status_code == 200
    assert noting.threads
    assert threading.current_thread() not in noting.threads


def test_lines(app: FastAPI, loaded: dict[str, LoadedLine]) -> None:
    listed = send(app, "GET", "/v1/lines").json()
    assert listed["not_ready"] == []
    assert [line["line"] for line in listed["lines"]] == ["line-a", "line-b"]
    one = send(app, "GET", "/v1/lines/line-b").json()
    assert one == listed["lines"][1]
    assert one == {
        "line": "line-b",
        "model": "wtflow-line-b",
        "model_version": 3,
        "bundle_digest": loaded["line-b"].info.bundle_digest,
        "threshold": loaded["line-b"].detector.calibration.threshold,
        "target_fpr": 0.1,
        "image_size": [64, 64],
        "backbone": "tf_efficientnet_lite0",
        "provenance": {"git_commit": "0" * 40, "data_version": "f" * 32 + ".dir", "seed": 1},
    }


class Loading:
    """A line whose model never gets loaded."""

    async def info(self) -> LineInfo:
        await asyncio.Event().wait()
        raise AssertionError

    async def score(self, image: bytes, heatmap: bool) -> ScoreReply:
        await asyncio.Event().wait()
        raise AssertionError


class Failing(LineScorer):
    """A line with a fault that nobody foresaw."""

    async def score(self, image: bytes, heatmap: bool) -> ScoreReply:
        raise RuntimeError("a secret of the machine room")


def test_health(app: FastAPI) -> None:
    assert send(app, "GET", "/healthz").json() == {"status": "alive"}
    assert send(app, "GET", "/readyz").json() == {"status": "ready", "lines": ["line-a", "line-b"]}


def test_not_ready_says_which(loaded: dict[str, LoadedLine]) -> None:
    scorers: dict[str, Scorer] = {"line-a": LineScorer(loaded["line-a"]), "line-z": Loading()}
    app = app_over(scorers, reply_timeout_s=0.05, probe_timeout_s=0.05)
    assert send(app, "GET", "/healthz").status_code == 200
    reply = send(app, "GET", "/readyz")
    error = assert_refused(reply, 503, "line_not_ready")
    assert "line-z" in error["message"]
    assert "line-a" not in error["message"]
    assert reply.headers["retry-after"] == "1"
    listed = send(app, "GET", "/v1/lines").json()
    assert [line["line"] for line in listed["lines"]] == ["line-a"]
    assert listed["not_ready"] == ["line-z"]
    assert_refused(send(app, "GET", "/v1/lines/line-z"), 503, "line_not_ready")
    assert_refused(send(app, "POST", "/v1/lines/line-z/score", content=PHOTO), 503, "line_not_ready")


def test_unexpected_fault_is_logged_and_hidden(loaded: dict[str, LoadedLine], caplog: pytest.LogCaptureFixture) -> None:
    app = app_over({"line-a": Failing(loaded["line-a"])})
    with caplog.at_level(logging.ERROR, logger="serving.api"):
        reply = send(app, "POST", SCORE, content=PHOTO)
    assert_refused(reply, 500, "internal")
    assert "secret" not in reply.text
    assert "Traceback" not in reply.text
    assert "a secret of the machine room" in caplog.text


def test_openapi_tells_the_truth(app: FastAPI) -> None:
    contract = send(app, "GET", "/openapi.json").json()
    score = contract["paths"]["/v1/lines/{line}/score"]["post"]
    assert set(score["requestBody"]["content"]) == set(IMAGE_TYPES)
    assert all(
        kind["schema"] == {"type": "string", "format": "binary"} for kind in score["requestBody"]["content"].values()
    )
    assert set(score["responses"]) == {"200", "404", "408", "413", "415", "422", "500", "503", "default"}
    for status, response in score["responses"].items():
        name = "ScoreReply" if status == "200" else "ErrorReply"
        assert response["content"]["application/json"]["schema"]["$ref"].endswith(f"/{name}")
    assert [parameter["name"] for parameter in score["parameters"]] == ["line", "heatmap"]
    assert {"/v1/lines", "/v1/lines/{line}", "/healthz", "/readyz"} < set(contract["paths"])
    assert "HTTPValidationError" not in contract["components"]["schemas"]
    docs = send(app, "GET", "/docs")
    assert docs.status_code == 200
    assert "/openapi.json" in docs.text


async def _dripping(count: int, pause: float) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x"
        await asyncio.sleep(pause)


def test_a_body_that_does_not_come_is_given_up_and_probes_are_answered_meanwhile(
    loaded: dict[str, LoadedLine],
) -> None:
    """Two slow clients fill the service; a third is told so at once, and health does not wait for them."""
    service = ScoringService({line: LineScorer(one) for line, one in loaded.items()})
    app = create_app(service, BodyLimits(MAX_BODY, seconds=2, at_once=2))

    async def replies() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            slow = [asyncio.ensure_future(client.post(SCORE, content=_dripping(200, 0.1))) for _ in range(2)]
            await asyncio.sleep(0.1)
            refused, health = await client.post(SCORE, content=PHOTO), await client.get("/healthz")
            assert not any(one.done() for one in slow)
            late = await asyncio.gather(*slow)
            return [refused, health, *late, await client.post(SCORE, content=PHOTO)]

    refused, health, *late, after = asyncio.run(replies())
    assert_refused(refused, 503, "overloaded")
    assert health.status_code == after.status_code == 200
    for reply in late:
        assert "2 s" in assert_refused(reply, 408, "slow_body")["message"]
