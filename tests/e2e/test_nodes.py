"""The fleet on a cluster of three nodes, one of which dies in the middle."""

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.project import Project
from tests.pipelines.fleets import digest, make_fleet

pytestmark = pytest.mark.slow
LINES = ("line-0", "line-1")
TRIES = 3
FLEET = [sys.executable, "-m", "pipelines.fleet"]
SETTINGS = {
    "WTFLOW_CHECKPOINT_S": "0",  # an epoch of these lines takes a tenth of a second, and is what the test waits for
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",  # a dead node is noticed within seconds
}
NODE = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats", "--block"]


class Node:
    """A node of a cluster on this machine: `ray start`, which stays, and what it started."""

    def __init__(self, project: Project, *arguments: str) -> None:
        """It is a part of the cluster. On a busy machine Ray loses patience with itself, so it is tried again."""
        command = [str(Path(sys.executable).with_name("ray")), "start", *NODE, *arguments]
        for _ in range(TRIES):
            said = Path(tempfile.mkstemp(dir=project.root)[1])
            with said.open("w") as file:
                self.process = subprocess.Popen(
                    command, cwd=project.root, env=project.environment, stdout=file, stderr=file
                )
            try:
                while self.process.poll() is None:
                    if "Ray runtime started" in said.read_text():
                        return
                    time.sleep(0.2)
            except BaseException:  # the test was cut off: nothing may stay
                self.kill()
                raise
        raise AssertionError(said.read_text())

    def tasks(self) -> list[str]:
        """Titles of the processes that train a line."""
        return [title for child in self._all() if "ray::_task" in (title := _title(child))]

    def kill(self) -> None:
        """All at once, as when the power goes."""
        processes = [*self._all(), psutil.Process(self.process.pid)]
        for process in processes:
            process.send_signal(signal.SIGSTOP)  # none may notice that another one is gone
        for process in processes:
            process.kill()
        self.process.wait()

    def _all(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two lines, ready to train."""
    return make_fleet(tmp_path_factory.mktemp("nodes"), len(LINES), epochs=60)


@pytest.fixture(scope="module")
def nodes(project: Project) -> Iterator[list[Node]]:
    """A head and two more, a CPU each; commands of the project join them."""
    place = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # sockets below it: their paths must be short
    port = _free_port()
    project.environment |= SETTINGS
    head = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={place}"]
    dashboard = [
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={_free_port()}",
        f"--ray-client-server-port={_free_port()}",
    ]
    started: list[Node] = []
    try:
        started.append(Node(project, *head, *dashboard))
        for number in (2, 3):
            started.append(Node(project, f"--address=127.0.0.1:{port}", f"--node-ip-address=127.0.0.{number}"))
        project.environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"
        yield started
    finally:
        project.environment.pop("RAY_ADDRESS", None)
        for node in started:
            if node.process.poll() is None:
                node.kill()
        shutil.rmtree(place, ignore_errors=True)


def test_a_node_that_dies_costs_no_line(project: Project, nodes: list[Node]) -> None:
    printed = project.run(*FLEET)
    assert "2 to train" in printed
    undisturbed = {line: digest(project, line) for line in LINES}
    project.untrain()
    process = subprocess.Popen(FLEET, cwd=project.root, env=project.environment, stdout=subprocess.PIPE, text=True)
    try:
        _wait_for(lambda: min(_epochs(project, line) for line in LINES) >= 2)
        victim = next(node for node in nodes[1:] if node.tasks())
        victim.kill()
        assert max(_epochs(project, line) for line in LINES) < 60, "the lines had ended before the node was killed"
        printed, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0
    starts = [line for line in printed.splitlines() if "started on node" in line]
    assert len(starts) == len(LINES) + 1  # one of them a second time, elsewhere
    assert len(set(starts)) == len(LINES) + 1
    assert {line: digest(project, line) for line in LINES} == undisturbed
    assert "0 to train" in project.run(*FLEET)


def _epochs(project: Project, line: str) -> int:
    """How many epochs are behind the newest checkpoint of a line that is being trained."""
    return max((int(path.name) for path in (project.root / ".wtflow/train").glob(f"{line}-*/fleet/0*")), default=0)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _wait_for(what: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
