"""The processes of a Ray that a driver started on this machine."""

from collections.abc import Callable

import psutil

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""They outlive a killed driver by a minute, and neither train nor write."""


def working(driver: int) -> list[psutil.Process]:
    """Those that may train or write: when the driver is killed, they end within seconds."""
    return _below(driver, lambda command: not command.startswith(AGENTS))


def training(driver: int) -> list[psutil.Process]:
    """The training workers."""
    return _below(driver, lambda command: "RayTrainWorker" in command)


def _below(driver: int, wanted: Callable[[str], bool]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if wanted(" ".join(process.cmdline())):
                found.append(process)
        except psutil.Error:  # gone meanwhile
            continue
    return found
