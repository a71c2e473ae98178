"""The processes of a Ray that a driver started on this machine."""

import psutil

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""They outlive a killed driver by a minute, and neither train nor write."""


def working(driver: int) -> list[psutil.Process]:
    """Those that may train or write, below the driver: when it is killed, they end within seconds."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if not " ".join(process.cmdline()).startswith(AGENTS):
                found.append(process)
        except psutil.Error:  # gone meanwhile
            continue
    return found
