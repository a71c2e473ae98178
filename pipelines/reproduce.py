"""The paper's preset over all categories of a benchmark data set, and a table beside the paper's figures.

ROOT/<category>/ ... -> .wtflow/reproduce/<data set>-<preset>/: a project of its own, a line a category, and table.json

Each stage runs in a process of its own, and is not run again when it was done with the same images, settings and code:
a run that was stopped goes on with the same command. Remove the folder to start anew.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from pipelines.command import call, parser
from pipelines.environment import RunSettings
from pipelines.lines import LINE_STAGES, NAME_RULE, is_line_name, read_params
from pipelines.preset import check, read_preset, read_presets
from pipelines.provenance import code_commit, stage_code
from wtflow.artefact import digest_of, read_json, replacing, write_json
from wtflow.data.tree import files
from wtflow.errors import WTFlowError
from wtflow.params import merged
from wtflow.scoring.metrics import auroc

STAGES = ("prepare", "extract", "train", "evaluate")
CODE = Path(__file__).absolute().parents[1]
NEEDED = ("dvc.yaml", "pipelines", "wtflow")
SHARED_TABLE = "split_csv/1cls.csv"
"""Of VisA: lies beside its objects, and is about all of them."""
OVERLAY = {
    "prepare": {"group_pattern": None},
    "train": {"calibration": {"target_fpr": 0.2}},
}
"""Small categories have too few normals for a threshold at 5 %; no figure of the table depends on it."""


class Figures(NamedTuple):
    """Means over the categories, in percent; None where the paper has none or nothing is defined."""

    image_auroc: float | None
    pixel_auroc: float | None


PAPER: Mapping[str, Figures] = {
    "mvtec_ad": Figures(99.05, None),
    "visa": Figures(96.52, 98.9),
    "mpdd": Figures(98.3, 94.2),
    "mvtec_loco": Figures(87.7, None),
    "mvtec_3d": Figures(85.1, 98.6),
    "mvtec_ad_2": Figures(None, None),
}
"""What time-reversed flow matching with local worst transport reports (arXiv 2508.05461)."""

Run = Callable[[Path, str, str], bool]
"""(project, stage, line) -> whether the stage ended well."""


def main(data_set: str, root: Path, preset: str, run: Run | None = None) -> bool:
    """Run what is not done yet, print the table; whether every category is in it."""
    if data_set not in PAPER:
        raise WTFlowError(f"DATASET: {data_set!r} is none of {', '.join(PAPER)}.")
    found = categories(root)
    overrides, name = preset_of(preset)
    place = (RunSettings().work / "reproduce" / f"{data_set}-{name}").absolute()
    params = lay_out(place, data_set, found, overrides)
    code = code_of_stages()
    failed = {}
    for line, folder in found.items():
        if stage := first_failure(place, params, line, source_of(folder), code, run or run_stage):
            failed[line] = stage
    publish(place, data_set, name, list(found), failed)
    return not failed


def categories(root: Path) -> dict[str, Path]:
    """Folders of images by the name of their line."""
    if not root.is_dir():
        raise WTFlowError(f"ROOT: {root} is no folder. Name the one that holds the categories of the data set.")
    folders = [path for path in sorted(root.iterdir()) if (path / "train").is_dir() or (path / "Data/Images").is_dir()]
    if not folders:
        raise WTFlowError(
            f"ROOT: {root} holds no category (a folder with train/ or Data/Images/). Name its parent, or child."
        )
    found: dict[str, Path] = {}
    for path in folders:
        line = re.sub(r"[^a-z0-9]+", "-", path.name.lower()).strip("-")
        if not is_line_name(line):
            raise WTFlowError(f"ROOT: {path} gives no name of a line ({line!r}). Rename the folder: {NAME_RULE}.")
        if line in found:
            raise WTFlowError(
                f"ROOT: {found[line]} and {path} would both be the line {line}. Rename one of the folders."
            )
        found[line] = path.absolute()
    return found


def preset_of(preset: str) -> tuple[Mapping[str, Any], str]:
    """Overrides and name of a preset of presets/, or of a YAML file."""
    path = Path(preset)
    if path.suffix == ".yaml" and path.is_file():
        return read_preset(path), path.stem
    presets = read_presets()
    if preset not in presets:
        raise WTFlowError(
            f"PRESET: {preset!r} is none of {', '.join(presets)}, and no .yaml file. See docs/presets.md."
        )
    return presets[preset], preset


def lay_out(place: Path, data_set: str, found: Mapping[str, Path], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Make the project: params.yaml, data/raw, and links to the code, which `train` takes note of. Returns the
    parameters."""
    sections = merged(merged({stage: read_params()[stage] for stage in LINE_STAGES}, OVERLAY), overrides)
    sections["prepare"] = {**sections["prepare"], "layout": data_set}
    lines: dict[str, dict[str, Any]] = {line: {stage: {} for stage in LINE_STAGES} for line in found}
    params = {**sections, "fetch": {}, "lines": lines}
    for line in found:
        check(params, line, lines[line])
    with replacing(place / "params.yaml") as draft:
        draft.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    for name in NEEDED:
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(CODE / name)
    for line, folder in found.items():
        bring(folder, place / "data/raw" / line)
    return params


def bring(folder: Path, raw: Path) -> None:
    """Let `raw` be the category: a link to it. VisA's objects share a table beside them, which has to be inside: theirs
    is a folder of hard links, or of copies where the disk is another."""
    table, note = folder.parent / SHARED_TABLE, raw.with_name(f"{raw.name}.source.json")
    raw.parent.mkdir(parents=True, exist_ok=True)
    if raw.is_symlink():
        raw.unlink()
    if not table.is_file() or (folder / SHARED_TABLE).exists():
        if raw.is_dir():
            shutil.rmtree(raw)
        note.unlink(missing_ok=True)
        raw.symlink_to(folder)
        return
    source = source_of(folder)
    if raw.is_dir() and note.exists() and read_json(note) == source:
        return
    with replacing(raw) as draft:
        shutil.copytree(folder, draft, copy_function=_link_or_copy)
        (draft / "split_csv").mkdir()
        shutil.copyfile(table, draft / SHARED_TABLE)
    write_json(note, source)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def source_of(folder: Path) -> str:
    """Which images a category is, without reading them: a digest of the path, size and time of every file."""
    paths = [folder / name for name in files(folder)]
    if (table := folder.parent / SHARED_TABLE).is_file():
        paths.append(table)
    found = [(path, path.stat() if path.exists() else path.lstat()) for path in paths]
    return digest_of([[str(path.absolute()), status.st_size, status.st_mtime_ns] for path, status in found])


def code_of_stages() -> dict[str, str]:
    """A digest of each stage's source files, as dvc.yaml lists them."""
    return {stage: digest_of(stage_code(stage, CODE)) for stage in STAGES}


def first_failure(
    place: Path, params: Mapping[str, Any], line: str, source: str, code: Mapping[str, str], run: Run
) -> str | None:
    """Run the stages of a line that are not done with these images, settings and code; the one that failed, or None."""
    note = place / "done" / f"{line}.json"
    done = read_json(note) if note.exists() else {}
    for number, stage in enumerate(STAGES, start=1):
        wanted = digest_of([source, *([params[one], code[one]] for one in STAGES[:number])])
        if done.get(stage) == wanted:
            continue
        done = {one: done[one] for one in STAGES[: number - 1]}
        write_json(note, done)  # beforehand: one that fails may have written all the same
        if not run(place, stage, line):
            return stage
        write_json(note, done := {**done, stage: wanted})
    return None


def run_stage(place: Path, stage: str, line: str) -> bool:
    """A stage as a user types it, in the project `place`."""
    path = os.pathsep.join([str(CODE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "WTFLOW_WORK": str(place / ".wtflow")}
    command = [sys.executable, "-m", f"pipelines.{stage}", line]
    return subprocess.run(command, cwd=place, env=environment).returncode == 0


def publish(place: Path, data_set: str, preset: str, lines: Sequence[str], failed: Mapping[str, str]) -> None:
    """Print the table, and write it as table.json."""
    rows = {line: figures(place, line, data_set) for line in lines if line not in failed}
    columns = [[row[column] for row in rows.values()] for column in range(len(Figures._fields))]
    mean = Figures(*(mean_of(values) for values in columns))
    difference = Figures(*map(difference_of, mean, PAPER[data_set]))
    table = Table("category", "image AUROC", "pixel AUROC", title=f"{data_set}, preset {preset}, percent")
    for line in lines:
        cells = [f"failed in {failed[line]}", ""] if line in failed else [shown(value) for value in rows[line]]
        table.add_row(line, *cells)
    table.add_section()
    table.add_row(f"mean of {len(rows)}" + (f" of {len(lines)}" if failed else ""), *map(shown, mean))
    table.add_row("paper", *map(shown, PAPER[data_set]))
    table.add_row("difference", *(shown(value, "+.2f") for value in difference))
    Console().print(table)
    if failed:
        Console().print("Not all categories are there: see the errors above, then type the same command again.")
    write_json(
        place / "table.json",
        {
            "data_set": data_set,
            "preset": preset,
            "commit": code_commit(NEEDED),
            "categories": {line: row._asdict() for line, row in rows.items()},
            "failed": dict(failed),
            "mean": mean._asdict(),
            "paper": PAPER[data_set]._asdict(),
            "difference": difference._asdict(),
        },
    )


def figures(place: Path, line: str, data_set: str) -> Figures:
    """A category's figures in percent. Image AUROC of MVTec LOCO AD is, as its authors have it, the mean of those for
    logical and for structural anomalies."""
    metrics = read_json(place / f"metrics/{line}.json")
    image = metrics["image_auroc"]
    if data_set == "mvtec_loco":
        rows = pq.read_table(place / f"evaluations/{line}/per_image.parquet").to_pylist()
        normal = np.array([row["score"] for row in rows if row["label"] == "normal"])
        kinds = sorted({row["defect"] for row in rows if row["label"] == "anomalous"})
        image = mean_of([auroc(normal, np.array([r["score"] for r in rows if r["defect"] == kind])) for kind in kinds])
    return Figures(*(None if value is None else 100.0 * value for value in (image, metrics["pixel_auroc"])))


def mean_of(values: Sequence[float | None]) -> float | None:
    """None if any is missing: a mean over other categories would be another figure."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def difference_of(ours: float | None, theirs: float | None) -> float | None:
    """In percentage points."""
    return None if ours is None or theirs is None else ours - theirs


def shown(value: float | None, form: str = ".2f") -> str:
    """A figure as text."""
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    example = "example: python -m pipelines.reproduce mvtec_ad /data/mvtec_anomaly_detection"
    options = parser("pipelines.reproduce", __doc__, example)
    options.add_argument("data_set", metavar="DATASET", help=", ".join(PAPER))
    options.add_argument("root", metavar="ROOT", type=Path, help="folder that holds the categories")
    options.add_argument("--preset", default="paper", help="of presets/, or a .yaml file of that form (default: paper)")
    arguments = options.parse_args()
    sys.exit(0 if call(lambda: main(arguments.data_set, arguments.root, arguments.preset)) else 1)
