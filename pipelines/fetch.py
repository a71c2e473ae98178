"""Stage `fetch`: the raw images of a line, from an installed package or a bucket, for the lines under `fetch`.

package -> data/raw/<line>/{images/*.png,labels.csv}
s3://bucket/prefix -> data/raw/<line>/, as it lies in the bucket
"""

import csv
import errno
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator
from rich.console import Console

from pipelines.adapters.s3 import Bucket, Fetched, S3Settings
from pipelines.environment import RunSettings, progress
from pipelines.lines import fetch_params
from pipelines.stage import run
from wtflow.artefact import put, replacing
from wtflow.errors import WTFlowError
from wtflow.params import Section

MODULES = {"elpv-dataset": "elpv_dataset"}


class FetchParams(Section):
    """Where a line's raw images come from: `package` and `select`, or `url`."""

    package: Literal["elpv-dataset"] | None = None
    """An installed package that carries images."""
    select: Literal["mono", "poly"] | None = None
    """Of the package: cell type, mono- or polycrystalline."""
    url: str | None = None
    """s3://bucket/prefix: everything below it, in the layout that the line prepares."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.package is None) == (self.url is None) or (self.package is None) != (self.select is None):
            raise ValueError("needs either package and select, or url: s3://bucket/prefix")
        return self


def main(line: str) -> None:
    """Replace data/raw/<line> by what its source holds."""
    params = fetch_params(line, FetchParams)
    raw = Path("data/raw") / line
    _check_place(raw)
    if params.url is not None:
        fetch_bucket(line, params.url, raw)
    elif params.package is not None:
        fetch_package(_package_folder(params.package), params.select, raw)


def fetch_bucket(line: str, url: str, raw: Path) -> None:
    """Bring what is new or changed. Unfinished work waits in the work folder for the same command."""
    place = RunSettings().work / "fetch"
    work = place / line
    bucket = Bucket(url, S3Settings())
    with progress(f"fetch {line}", total=0) as bar:
        task = bar.task_ids[0]
        objects = bucket.listing()
        if raw.is_dir() and not work.exists():  # of an earlier run: what is still right is not downloaded again
            _copy(raw, work)
        fetched = bucket.fetch(
            objects, work, place / f"{line}.jsonl", lambda done, total: bar.update(task, completed=done, total=total)
        )
    _hand_over(work, raw)
    Console().print(said(line, url, fetched), highlight=False, markup=False, soft_wrap=True)


def said(line: str, url: str, fetched: Fetched) -> str:
    """What was brought, in words."""
    repeated = ", ".join(f"{count} {reason}" for reason, count in fetched.repeated.most_common())
    parts = [
        f"fetch {line}: {fetched.objects} objects of {url}, {fetched.bytes / 1e6:.1f} MB",
        f"{fetched.here_already} of them were here",
        f"{fetched.repeated.total()} requests repeated" + (f" ({repeated})" if repeated else ""),
    ]
    if fetched.by_size_alone:
        parts.append(f"{fetched.by_size_alone} could be checked by size alone")
    if fetched.not_files:
        parts.append(
            f"{len(fetched.not_files)} keys left out that cannot be file names, first {fetched.not_files[0]!r}"
        )
    return "; ".join(parts)


def fetch_package(package: Path, select: str | None, raw: Path) -> None:
    """Copy the images of one cell type, and write their labels.csv."""
    with replacing(raw) as draft:
        (draft / "images").mkdir(parents=True)
        with (draft / "labels.csv").open("w", encoding="utf-8", newline="") as file:
            labels = csv.writer(file, lineterminator="\n")
            labels.writerow(["path", "probability", "cell"])
            for cell, (path, probability, kind) in enumerate(_labels(package)):
                if kind == select:
                    copied = f"images/{Path(path).name}"
                    shutil.copyfile(_image(package, path), draft / copied)
                    labels.writerow([copied, probability, cell])


def _check_place(raw: Path) -> None:
    if not raw.is_dir() and (raw.is_symlink() or raw.exists()):
        raise WTFlowError(
            f"{raw}: has to be a folder, or absent; it is a file, or a link to nothing. Mount the disk it leads to, or "
            "remove it; then type the same command again."
        )


def _copy(source: Path, target: Path) -> None:
    """Copy what files there are; a link to nothing is left out. Raises the first `OSError`, which `shutil.copytree`
    would hide among others."""
    target.mkdir(parents=True)
    for path in source.rglob("*"):
        if path.is_file():
            copied = target / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)


def _hand_over(work: Path, raw: Path) -> None:
    """Put the folder `work` in the place of `raw`. If that fails it stays where it is."""
    raw.parent.mkdir(parents=True, exist_ok=True)
    try:
        put(work, raw)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise WTFlowError(
                f"{raw}: cannot be replaced ({error.strerror}). Is it a mount point, or may you not write beside it? "
                f"Mend that, then type the same command again: the download is kept in {work}."
            ) from None
        with replacing(raw) as draft:  # on another disk
            _copy(work, draft)
        shutil.rmtree(work)


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
