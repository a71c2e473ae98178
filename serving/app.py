"""`python -m serving.app`: serve every line that has a champion, until Ctrl-C or SIGTERM.

Ray runs on this machine unless `RAY_ADDRESS` names a cluster. Only what was started here is stopped here.
"""

import argparse
import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import httpx
import typer

from serving import resolve
from serving.resolve import Champion
from serving.sample import curl, sample_image
from serving.schema import LineList
from serving.settings import PREFIX, ServeSettings
from wtflow.errors import WTFlowError

APPLICATION = "wtflow"
OBJECT_STORE_BYTES = 256 * 1024 * 1024
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "DO_NOT_TRACK": "true",
    "RAY_worker_niceness": "0",  # Ray's 15 lets anything else on the machine starve the service
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # three of Ray's 5 s are too short on a busy machine
}
"""Set unless the caller has set them; read by Ray and MLflow when they are imported."""
LOGGING = {"log_level": "WARNING", "enable_access_log": False}


def main() -> int:
    """Exit status: 0 after a stop that was asked for, 1 after a mistake, which is explained."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _signals(signal.default_int_handler)
    try:
        settings = ServeSettings.from_environment()
        champions = resolve.champions(resolve.registry_uri())
        with _ray(settings), _application(champions, settings):
            _announce(champions, settings)
            signal.pause()
    except WTFlowError as error:
        typer.echo(f"error: {error}", err=True)
        return 1
    except KeyboardInterrupt:
        typer.echo("stopped")
    return 0


def _signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """What Ctrl-C and SIGTERM do. The default interrupt handler makes both a KeyboardInterrupt."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


@contextlib.contextmanager
def _ray(settings: ServeSettings) -> Iterator[None]:
    """Connected to Ray inside: to the cluster of `RAY_ADDRESS`, else to one started here and ended on leaving."""
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        _require_free_port(settings)
        if "RAY_AUTH_MODE" not in os.environ:  # other users of the machine can reach Ray's ports, but not use them
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    stops: list[int] = []
    with _ray_folder(address) as options, ThreadPoolExecutor(1) as starter:
        try:
            # a stop in the middle of Ray's start would leave processes behind: it waits until after. In a thread,
            # where Ray cannot take SIGTERM for itself; one that lives on, for Linux ends Ray's processes with the
            # thread that started them
            _signals(lambda number, frame: stops.append(number))
            starter.submit(ray.init, address, logging_level="ERROR", **options).result()
            _signals(signal.default_int_handler)
            if stops:
                raise KeyboardInterrupt
            yield
        except ConnectionError as error:
            message = f"RAY_ADDRESS={address}: no Ray there ({error}). Unset it to start one here."
            raise WTFlowError(message) from error
        finally:
            _signals(signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
            ray.shutdown()


@contextlib.contextmanager
def _ray_folder(address: str) -> Iterator[dict[str, Any]]:
    """Options of a local Ray, its logs and sockets in a folder of its own that is removed; none for a cluster."""
    if address != "local":
        yield {}
        return
    folder = tempfile.mkdtemp(prefix="wtflow-ray-")  # short: the paths of sockets are limited to 107 bytes
    try:
        yield {
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": folder,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _require_free_port(settings: ServeSettings) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise WTFlowError(
                    f"{PREFIX}HOST={settings.host}: {error.strerror}. "
                    "Set it to an IPv4 address of this machine: 127.0.0.1, or 0.0.0.0 for all of them"
                ) from None
            raise WTFlowError(
                f"{settings.host}:{settings.port} cannot be listened on: {error.strerror}. "
                f"Stop what runs there, or type: {PREFIX}PORT={settings.port + 1} make serve"
            ) from None


@contextlib.contextmanager
def _application(champions: Sequence[Champion], settings: ServeSettings) -> Iterator[None]:
    """Every line's model is loaded inside; on leaving, requests under way are answered and the service ends."""
    from ray import serve
    from ray.exceptions import RayError

    from serving.deployment import build_application

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    names = ", ".join(f"{champion.line} version {champion.version}" for champion in champions)
    typer.echo(f"loading {names} ...")
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port}, logging_config=LOGGING)
    except (RayError, TimeoutError) as error:
        said = str(error).partition("\n")[0]
        raise WTFlowError(
            f"Ray's HTTP process did not start ({said}). Is the machine overloaded? Then type the same command."
        ) from error
    application = build_application(champions, settings)
    try:
        try:
            serve.run(application, name=APPLICATION, route_prefix="/", logging_config=LOGGING)
        except RuntimeError as error:
            found = serve.status().applications[APPLICATION].deployments
            reasons = [f"  {name}: {_cause(one.message)}" for name, one in found.items() if one.message]
            raise WTFlowError("\n".join(["the service did not start", *(reasons or [str(error)])])) from error
        yield
    finally:
        _signals(signal.SIG_IGN)
        serve.delete(APPLICATION)


def _cause(message: str) -> str:
    """What one of our own errors says inside the traceback that Serve reports, else all of the report."""
    said = re.findall(r"^wtflow\.errors\.\w+: (.*)$", message, re.MULTILINE)
    return said[-1] if said else message


def _announce(champions: Sequence[Champion], settings: ServeSettings) -> None:
    """Ask the service what it serves, over HTTP, and print it with a command a line."""
    host = "127.0.0.1" if settings.host == "0.0.0.0" else settings.host
    url = f"http://{host}:{settings.port}"
    typer.echo(
        f"\nWT-Flow listens on {url}: open it in a browser and drop a photograph there, or use the commands below. "
        f"(Contract: {url}/docs; without the internet: {url}/openapi.json.) Ctrl-C stops it."
    )
    try:  # not through a proxy: this is the same machine
        reply = httpx.get(f"{url}/v1/lines", timeout=settings.reply_timeout_s, trust_env=False).raise_for_status()
        served = {info.line: info for info in LineList.model_validate_json(reply.content).lines}
    except httpx.HTTPError as error:
        typer.echo(f"it does not tell its lines yet ({error!r}); ask {url}/v1/lines", err=True)
        return
    for champion in champions:
        if info := served.get(champion.line):
            typer.echo(f"\n{info.line}: version {info.model_version}, bundle {info.bundle_digest[:12]}")
            typer.echo(f"  {curl(url, info.line, sample_image(champion))}")
        else:
            typer.echo(f"\n{champion.line}: does not answer yet; ask {url}/readyz", err=True)


def _arguments() -> argparse.ArgumentParser:
    """None: settings come from the environment."""
    names = ", ".join(PREFIX + name.upper() for name in ServeSettings.model_fields)
    return argparse.ArgumentParser(
        prog="python -m serving.app",
        description=__doc__,
        epilog=f"settings, from the environment: {names}. example: {PREFIX}PORT=8001 python -m serving.app",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


if __name__ == "__main__":
    _arguments().parse_args()
    sys.exit(main())
