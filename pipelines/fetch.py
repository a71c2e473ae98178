"""Stage `fetch`: photographs of an installed package, for the lines under `fetch` in params.yaml.

package -> data/raw/<line>/{images/*.png,labels.csv}
"""

import csv
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pipelines.lines import fetch_params
from pipelines.stage import run
from wtflow.artefact import replacing
from wtflow.errors import WTFlowError
from wtflow.params import Section

MODULES = {"elpv-dataset": "elpv_dataset"}


class FetchParams(Section):
    """Where a line's raw images come from."""

    package: Literal["elpv-dataset"]
    """An installed package that carries images."""
    select: Literal["mono", "poly"]
    """Cell type: mono- or polycrystalline."""


def main(line: str) -> None:
    """Replace data/raw/<line> by the package's images of one cell type and their labels.csv."""
    params = fetch_params(line, FetchParams)
    package = _package_folder(params.package)
    with replacing(Path("data/raw") / line) as draft:
        (draft / "images").mkdir(parents=True)
        with (draft / "labels.csv").open("w", encoding="utf-8", newline="") as file:
            labels = csv.writer(file, lineterminator="\n")
            labels.writerow(["path", "probability", "cell"])
            for cell, (path, probability, kind) in enumerate(_labels(package)):
                if kind == params.select:
                    copied = f"images/{Path(path).name}"
                    shutil.copyfile(_image(package, path), draft / copied)
                    labels.writerow([copied, probability, cell])


def _package_folder(package: str) -> Path:
    spec = find_spec(MODULES[package])
    if spec is None or spec.origin is None:
        raise WTFlowError(f"params.yaml: fetch.package: {package} is not installed. Type: pip install {package}")
    return Path(spec.origin).parent / "data"


def _labels(package: Path) -> list[tuple[str, str, str]]:
    """Path, probability and type of every cell in file order, which keeps the cells of a module together."""
    path = package / "labels.csv"
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        return [(path, probability, kind) for path, probability, kind in rows]
    except (OSError, ValueError) as error:
        raise WTFlowError(f"{path}: not the labels of elpv-dataset ({error}). Install the package anew.") from None


def _image(package: Path, path: str) -> Path:
    if not (package / path).is_file():
        raise WTFlowError(f"{package / path}: labels.csv names it, but it is not there. Install the package anew.")
    return package / path


if __name__ == "__main__":
    run(main, __doc__, "python -m pipelines.fetch solar-mono")
