"""Importing a module does nothing: no file, no cluster, no tracker, no message."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guards.closure import ROOT

EXCEPTIONS = {"pipelines.adapters.pyfunc_model"}
"""MLflow runs this file to load the model, and requires it to call `set_model` at once."""
PROBE = """
import importlib, json, sys, threading
import torch
threads, settings = threading.active_count(), (torch.get_num_threads(), torch.is_grad_enabled())
before = torch.random.get_rng_state()
heavy = {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy[name] = sorted({"ray", "mlflow", "dvc", "fastapi", "timm", "torchvision"} & set(sys.modules))
ray, mlflow = sys.modules.get("ray"), sys.modules.get("mlflow")
print(json.dumps({
    "heavy": heavy,
    "ray": bool(ray and ray.is_initialized()),
    "mlflow": bool(mlflow and mlflow.active_run()),
    "threads": threading.active_count() - threads,
    "torch": (torch.get_num_threads(), torch.is_grad_enabled()) == settings,
    "random": torch.equal(before, torch.random.get_rng_state()),
}))
"""


def modules(*packages: str) -> list[str]:
    files = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    return [name for name in names if name not in EXCEPTIONS]


def probe(names: list[str], folder: Path) -> dict[str, object]:
    """Import in a fresh process, in an empty folder, and say what it did."""
    home = folder / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    work = folder / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *names],
        cwd=work,
        env=environment | {"PYTHONPATH": str(ROOT), "HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(work.iterdir()) == []
    *printed, last = done.stdout.splitlines()
    assert printed == []
    found: dict[str, object] = json.loads(last)
    return found


@pytest.mark.slow
def test_the_library_imports_inertly_and_alone(tmp_path: Path) -> None:
    names = modules("wtflow")
    assert "wtflow.data.sources.elpv" in names
    found = probe(names, tmp_path)
    assert found.pop("heavy") == {name: [] for name in names}
    assert found == {"ray": False, "mlflow": False, "threads": 0, "torch": True, "random": True}


def test_the_command_line_does_not_wait_for_torch() -> None:
    code = "import sys, wtflow.cli; print(sorted({'torch', 'scipy', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
@pytest.mark.parametrize("package", ["pipelines", "serving"])
def test_the_applications_import_inertly(package: str, tmp_path: Path) -> None:
    found = probe(modules(package), tmp_path)
    assert (found["ray"], found["mlflow"], found["torch"], found["random"]) == (False, False, True, True)


def test_the_exception_is_still_one() -> None:
    for name in EXCEPTIONS:
        assert "set_model(" in (ROOT / Path(*name.split("."))).with_suffix(".py").read_text()
