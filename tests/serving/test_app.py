"""`python -m serving.app` as a person meets it: a process, its printed lines, real HTTP, signals."""

import asyncio
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from ray import serve

from serving.app import _application, _require_free_port
from serving.settings import ServeSettings
from tests.serving.lines import LIMITS, encoded, picture
from tests.serving.registry import crown, register
from wtflow.bundle import load_bundle
from wtflow.data.images import decode
from wtflow.detector import Detector
from wtflow.errors import WTFlowError

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
START_S, STOP_S = 300, 90
CLIENTS, REQUESTS = 8, 200
CLIENTS_OF_A_FULL_QUEUE = 140
"""More than the 64 that wait and the 16 that are under way, fewer than the 160 that the gateway takes of two lines."""
MAX_BODY = 2_000_000


@dataclass(frozen=True)
class Service:
    """A running service and what it printed until it was ready."""

    process: subprocess.Popen[str]
    url: str
    mark: str
    printed: str


def environment(mark: str, registry: str, port: int) -> dict[str, str]:
    """Of a service whose processes are found again by `mark`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WTFLOW_", "MLFLOW_"))}
    return kept | {
        "WTFLOW_TEST_MARK": mark,
        "MLFLOW_TRACKING_URI": registry,
        "WTFLOW_SERVE_PORT": str(port),
        "WTFLOW_SERVE_MAX_BODY_BYTES": str(MAX_BODY),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def marked_processes(mark: str) -> list[str]:
    """Command lines of the processes that inherited the mark."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"WTFLOW_TEST_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it ended meanwhile
            continue
    return found


def printed_until_ready(process: subprocess.Popen[str], lines: int) -> str:
    """What it prints until there is a curl line for each product line. Fails when it ends, or takes too long."""
    assert process.stdout is not None
    watchdog = threading.Timer(START_S, process.kill)
    watchdog.start()
    printed = ""
    try:
        for text in process.stdout:
            printed += text
            if printed.count("curl ") == lines:
                return printed
    finally:
        watchdog.cancel()
    pytest.fail(f"the service ended with {process.wait()}:\n{printed}")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, bundles: dict[str, Path]) -> str:
    """Both lines have a champion, and a photograph whose name a shell would trip over."""
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    photo = folder / "it's a photo.png"
    photo.write_bytes(encoded(picture(5)))
    for line, bundle in bundles.items():
        crown(uri, line, register(uri, line, bundle, folder, {"sample_image": str(photo)}))
    return uri


@pytest.fixture(scope="module")
def service(registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    mark, port = uuid.uuid4().hex, free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.app"],
        env=environment(mark, registry, port),
        cwd=tmp_path_factory.mktemp("empty"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed = printed_until_ready(process, lines=2)
        assert process.stdout is not None
        # what comes after is read too: a service that warns of each refused request would wait for a full pipe
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield Service(process, f"http://127.0.0.1:{port}", mark, printed)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_S)


@pytest.fixture(scope="module")
def detectors(bundles: dict[str, Path]) -> dict[str, Detector]:
    return {line: load_bundle(path).detector() for line, path in bundles.items()}


def test_printed_curl_lines_work_as_printed(service: Service, detectors: dict[str, Detector]) -> None:
    commands = re.findall(r"^ *(curl .*)$", service.printed, re.MULTILINE)
    assert len(commands) == 2
    for line, command in zip(("line-a", "line-b"), commands, strict=True):
        answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        reply = json.loads(answer.stdout)
        photo = next(word[1:] for word in shlex.split(command) if word.startswith("@"))
        verdict = detectors[line].verdicts([decode(Path(photo).read_bytes(), LIMITS)])[0]
        assert (reply["line"], reply["model_version"], reply["heatmap"]) == (line, 1, None)
        assert reply["bundle_digest"][:12] in service.printed
        assert reply["score"] == pytest.approx(verdict.score, abs=1e-5)
        assert (reply["p_value"], reply["is_anomalous"]) == (verdict.p_value, verdict.is_anomalous)


def test_many_clients_get_offline_scores(service: Service, detectors: dict[str, Detector]) -> None:
    """200 requests from 8 threads over both lines: no error, and each score is the one computed offline."""
    photos = [encoded(picture(seed), "PNG" if seed % 2 else "JPEG") for seed in range(25)]
    offline = {
        line: [detector.verdicts([decode(photo, LIMITS)])[0].score for photo in photos]
        for line, detector in detectors.items()
    }

    def client(number: int) -> list[tuple[float, float, float]]:
        """(score, offline score, seconds) of every eighth request."""
        results = []
        with httpx.Client(base_url=service.url, timeout=60) as http:
            for request in range(number, REQUESTS, CLIENTS):
                line, photo = ("line-a", "line-b")[request // 25 % 2], request % 25
                start = time.perf_counter()
                reply = http.post(f"/v1/lines/{line}/score", content=photos[photo])
                assert reply.status_code == 200, reply.text
                results.append((reply.json()["score"], offline[line][photo], time.perf_counter() - start))
        return results

    start = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        results = [result for part in pool.map(client, range(CLIENTS)) for result in part]
    wall = time.perf_counter() - start
    latencies = sorted(seconds for _, _, seconds in results)
    print(f"\n{REQUESTS} requests, {CLIENTS} clients: {wall:.1f} s, p50 {1000 * latencies[REQUESTS // 2]:.0f} ms")  # noqa: T201
    assert len(results) == REQUESTS
    assert max(abs(score - expected) for score, expected, _ in results) <= 1e-5


@pytest.mark.parametrize(
    ("path", "headers", "body", "status", "code"),
    [
        ("/v1/lines/line-x/score", {}, b"whatever", 404, "unknown_line"),
        ("/v1/lines/line-a/score", {}, b"", 422, "empty"),
        ("/v1/lines/line-a/score", {}, b"hello", 415, "not_an_image"),
        ("/v1/lines/line-a/score", {"Content-Type": "application/json"}, b"{}", 415, "unsupported_content_type"),
        ("/v1/lines/line-a/score", {}, encoded(picture(1))[:300], 422, "truncated"),
        ("/v1/lines/line-a/score", {}, bytes(MAX_BODY + 1), 413, "too_many_bytes"),  # more than the service reads
        ("/v1/lines/line-a/score", {}, bytes(LIMITS.max_bytes + 1), 413, "too_many_bytes"),  # than the line takes
        ("/v1/lines/line-a/score", {}, encoded(picture(1, 1001, 1000)), 413, "too_many_pixels"),
        ("/v1/lines/line-a/score?heatmap=gif", {}, encoded(picture(1)), 422, "invalid_request"),
        ("/v2", {}, b"", 404, "not_found"),
        ("/healthz", {}, b"", 405, "method_not_allowed"),
    ],
)
def test_refusals(service: Service, path: str, headers: dict[str, str], body: bytes, status: int, code: str) -> None:
    reply = httpx.post(service.url + path, headers=headers, content=body, timeout=60)
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json")
    problem = reply.json()["error"]
    assert problem["code"] == code
    assert problem["message"]
    assert re.search(r"[Ss]end|[Ss]ave|[Ss]cale|Served here: line-a, line-b|see /docs", problem["remedy"])


def test_broken_images_do_not_fail_the_others(service: Service) -> None:
    """Sent at once, so that they meet in batches."""
    photos = [encoded(picture(seed)) if seed % 2 else encoded(picture(seed))[:200] for seed in range(16)]
    with ThreadPoolExecutor(len(photos)) as pool:
        statuses = pool.map(
            lambda photo: httpx.post(f"{service.url}/v1/lines/line-a/score", content=photo, timeout=60).status_code,
            photos,
        )
        assert list(statuses) == [422, 200] * 8


def test_health_lines_and_contract(service: Service) -> None:
    assert httpx.get(f"{service.url}/healthz").status_code == 200
    assert httpx.get(f"{service.url}/readyz").json() == {"status": "ready", "lines": ["line-a", "line-b"]}
    assert [line["line"] for line in httpx.get(f"{service.url}/v1/lines").json()["lines"]] == ["line-a", "line-b"]
    assert "/v1/lines/{line}/score" in httpx.get(f"{service.url}/openapi.json").json()["paths"]
    assert httpx.get(service.url).text.startswith("<!DOCTYPE html>")


def test_a_busy_line_stays_ready(service: Service) -> None:
    """More requests than its queue holds: some are told so, and the line is ready nevertheless."""
    photo = encoded(picture(5, 1000, 1000), "JPEG")  # a short body, so that all are there before the first is answered
    url = f"{service.url}/v1/lines/line-a"
    assert httpx.get(f"{service.url}/readyz", timeout=60).status_code == 200

    async def status(client: httpx.AsyncClient) -> int:
        return (await client.post(f"{url}/score?heatmap=png", content=photo)).status_code

    async def flooded() -> tuple[list[int], list[httpx.Response]]:
        """Statuses of the photographs, and what was said of the line meanwhile."""
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(), trust_env=False) as client:
            flood = [asyncio.ensure_future(status(client)) for _ in range(CLIENTS_OF_A_FULL_QUEUE)]
            probes = []
            while not all(one.done() for one in flood):
                probes += [await client.get(asked) for asked in (f"{service.url}/readyz", url)]
            return await asyncio.gather(*flood), probes

    statuses: set[int] = set()
    deadline = time.monotonic() + 60
    while statuses != {200, 503} and time.monotonic() < deadline:  # a flood that trickles in fills no queue
        answers, probes = asyncio.run(flooded())
        statuses |= set(answers)
        assert [probe.text for probe in probes if probe.status_code != 200] == []
    assert statuses == {200, 503}


@pytest.mark.parametrize("host", ["no-such-host.invalid", "::1", "192.0.2.1"])
def test_a_host_that_is_not_this_machine_is_explained(host: str) -> None:
    """A name that means nothing, an IPv6 address, an address of nobody (RFC 5737)."""
    with pytest.raises(WTFlowError, match=rf"^WTFLOW_SERVE_HOST={host}: .*127\.0\.0\.1") as caught:
        _require_free_port(ServeSettings(host=host))
    assert "WTFLOW_SERVE_PORT" not in str(caught.value)


def test_taken_port_is_explained(service: Service, registry: str) -> None:
    taken = int(service.url.rpartition(":")[2])
    done = subprocess.run(
        [sys.executable, "-m", "serving.app"],
        env=environment(uuid.uuid4().hex, registry, taken),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: 127.0.0.1:{taken} cannot be listened on")
    assert "Traceback" not in done.stderr


def test_missing_registry_is_explained(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serving.app"],
        env=environment(uuid.uuid4().hex, f"sqlite:///{tmp_path / 'none.db'}", free_port()),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "make repro" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_machine_too_busy_for_the_http_process_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Ray's words; when it gives up depends on what else the machine does, so that is not waited for here."""

    def too_busy(**options: object) -> None:
        raise TimeoutError("HTTP proxies not available after 60s.")

    monkeypatch.setattr(serve, "start", too_busy)
    settings = ServeSettings.from_environment()
    with pytest.raises(WTFlowError, match=r"did not start \(HTTP proxies .*overloaded"), _application([], settings):
        pytest.fail("it serves")


def test_sigterm_leaves_nothing_behind(service: Service) -> None:
    """Last in this file: it ends the service."""
    assert any("raylet" in command for command in marked_processes(service.mark))
    folders = {
        word for command in marked_processes(service.mark) for word in re.findall(r"/\S*wtflow-ray-\w+", command)
    }
    assert folders
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(STOP_S) == 0
    deadline = time.monotonic() + 20
    while marked_processes(service.mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert marked_processes(service.mark) == []
    assert not any(Path(folder).exists() for folder in folders)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{service.url}/healthz")
