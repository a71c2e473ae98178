"""`wtflow`, or `python -m wtflow.cli`: score photographs with a bundle, look at one, watch for drift, keep the feature
cache.

Scores are the service's: the same detector, one photograph at a time. Exit status: 0; 1 after an image or a file that
is not right, which is explained; 2 for a command that is not understood; 3 if `drift` found one.

What takes seconds to import is imported by the command that needs it: `--help`, and a word to a mistyped command, do
not wait for torch.
"""

import csv
import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from wtflow.artefact import replacing
from wtflow.cache_commands import JsonOption, cache
from wtflow.data.images import decode
from wtflow.data.tree import IMAGE_SUFFIXES, files, visible
from wtflow.errors import ImageError, WTFlowError
from wtflow.tables import console, drift_table, verdict_table

if TYPE_CHECKING:
    from wtflow.bundle import Bundle
    from wtflow.detector import Detector, Verdict

OVERLAY_SUFFIX = ".overlay.png"
SAID = ("score", "p_value", "threshold", "is_anomalous", "needs_review")
"""Figures of a verdict, named as in the service's reply."""


class Commands(TyperGroup):
    """Explains what a person can mend, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; a `WTFlowError`, or a file that the system refuses, ends it with status 1."""
        try:
            return super().invoke(ctx)
        except WTFlowError as error:
            typer.echo(f"error: {error}", err=True)
        except OSError as error:
            if error.errno == errno.EPIPE:  # typer ends it quietly
                raise
            typer.echo(f"error: {error.filename or _unnamed()}: {error.strerror or error}", err=True)
        raise typer.Exit(1)


def _unnamed() -> str:
    """What an error without a name is about. Standard output that still refuses what it holds is closed: else the
    interpreter tries once more at its end, and complains."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            sys.stdout.close()
        return "standard output"
    return "standard output or a file"


app = typer.Typer(
    cls=Commands,
    help="Visual inspection with a trained bundle: the folder models/<line> after `make repro`, or a copy of it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(cache, name="cache")
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle, e.g. models/solar-mono.")]


@dataclass(frozen=True)
class Photograph:
    """A file to score."""

    path: Path
    name: str
    """Below the folder that was asked for, so that its overlay can be found again."""


@app.command(
    epilog="\b\nexamples:\n"
    "  wtflow score models/solar-mono cell.png\n"
    "  wtflow score models/solar-mono photographs/ --overlay heat/\n"
    "  wtflow score models/solar-mono photographs/ --csv verdicts.csv\n"
    "  wtflow score models/solar-mono photographs/ --json > verdicts.jsonl"
)
def score(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Files, or folders of them.")],
    json_lines: JsonOption = False,
    overlays: Annotated[
        Path | None,
        typer.Option(
            "--overlay",
            metavar="FOLDER",
            file_okay=False,
            help="Write each photograph with its heat map laid over it to this folder.",
        ),
    ] = None,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", dir_okay=False, help="Write a row an image to this file, for Excel."),
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads to compute with; 0: all cores it may use.")] = 1,
) -> None:
    """Score photographs: score, p-value, decision. An image that cannot be read, or an overlay that
    cannot be written, is reported; the others are scored."""
    import torch

    from wtflow.bundle import load_bundle

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    wanted = photographs(images)
    targets = {} if overlays is None else overlay_paths(wanted, overlays)
    loaded = load_bundle(bundle)
    detector = loaded.detector()
    verdicts: list[tuple[Path, Verdict]] = []
    said: list[dict[str, Any]] = []
    bad = 0
    aside = Console(stderr=True)
    for photograph in track(wanted, console=aside, transient=True, disable=json_lines or not aside.is_terminal):
        try:
            with photograph.path.open("rb") as file:
                picture = decode(file.read(detector.limits.max_bytes + 1), detector.limits)
            verdict = detector.verdicts([picture])[0]
        except (ImageError, OSError) as error:
            bad += 1
            said.append({"path": str(photograph.path), "bundle_digest": loaded.digest, **_why(error)})
            if json_lines:
                typer.echo(json.dumps(said[-1]))
            typer.echo("error: {path}: {reason}: {message}".format(**said[-1]), err=True)
            continue
        verdicts.append((photograph.path, verdict))
        figures = {name: getattr(verdict, name) for name in SAID}
        said.append({"path": str(photograph.path), "bundle_digest": loaded.digest, **figures})
        if json_lines:
            typer.echo(json.dumps(said[-1]))
        if overlays is not None:
            try:
                _write_overlay(targets[photograph], picture, verdict, detector)
            except OSError as error:
                bad += 1
                typer.echo(f"error: {targets[photograph]}: {error.strerror or error}", err=True)
    if verdicts and not json_lines:
        console().print(verdict_table(verdicts))
    if csv_file is not None:
        _write_csv(csv_file, said)
    if bad:
        drawn = "" if overlays is None else " or drawn"
        typer.echo(f"error: {bad} of {len(wanted)} images could not be scored{drawn}", err=True)
        raise typer.Exit(1)


@app.command(
    epilog="\b\nexamples:\n"
    "  wtflow inspect models/solar-mono\n"
    "  wtflow inspect models/solar-mono --json | jq .latency_ms"
)
def inspect(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """Show a bundle's settings, provenance, and cost on this machine."""
    from wtflow.bundle import load_bundle

    facts = described(load_bundle(bundle))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table(title=f"{facts['line']}  {facts['digest'][:12]}", show_header=False)
    for key, value in _flat(facts):
        table.add_row(Text(key), Text(value, overflow="fold"))
    console().print(table)


@app.command(
    epilog="\b\nexamples:\n"
    "  wtflow score models/solar-mono today/ --json | wtflow drift models/solar-mono -\n"
    "  wtflow drift models/solar-mono replies.jsonl --every 500 --json"
)
def drift(
    bundle: BundleArgument,
    replies: Annotated[
        typer.FileText,
        typer.Argument(
            metavar="REPLIES",
            help="The service's replies or `score --json`, a line each; - is standard input.",
            encoding="utf-8",
            errors="replace",
        ),
    ],
    every: Annotated[int, typer.Option(min=1, help="Replies that are compared at a time.")] = 200,
    level: Annotated[
        float, typer.Option(min=1e-9, max=0.5, help="Share of unchanged batches that may be called shifted.")
    ] = 0.001,
    as_json: JsonOption = False,
) -> None:
    """Tell whether the scores of production have changed. They are compared with the scores that calibrated
    the bundle, in the order of the file; the exit status is 3 if the newest batch is not like them."""
    from wtflow.bundle import load_bundle
    from wtflow.scoring.drift import batches, least_replies, read_scores

    loaded = load_bundle(bundle)
    scores, others = read_scores(replies, loaded.digest)
    if others:
        typer.echo(f"{replies.name}: {others} lines left out: refusals, or of another bundle", err=True)
    found = batches(loaded.calibration, scores, every, level)
    newest, least = found[-1], least_replies(loaded.calibration, level)
    if newest.images < least and newest.shift == "none":
        typer.echo(
            f"{replies.name}: replies in the newest batch: {newest.images}. At level {level:g} no batch of fewer than "
            f"{least} can be called shifted: collect more, or raise --every",
            err=True,
        )
    if as_json:
        typer.echo(json.dumps([asdict(batch) for batch in found], indent=2))
    else:
        title = f"{loaded.provenance.get('line')}  {loaded.digest[:12]}"
        console().print(drift_table(title, found, loaded.calibration, level))
    if newest.shift != "none":
        raise typer.Exit(3)


def photographs(places: Sequence[Path]) -> list[Photograph]:
    """The files to score, those of a folder in order of their names. Raises for a folder without one."""
    found = []
    for place in places:
        if not place.is_dir():
            found.append(Photograph(place, place.name))
            continue
        inside = [
            Photograph(place / name, name)
            for name in filter(visible, files(place))
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.endswith(OVERLAY_SUFFIX)
        ]
        if not inside:
            raise WTFlowError(f"{place}: no photograph in this folder. Looked for: {', '.join(IMAGE_SUFFIXES)}.")
        found += inside
    return found


def overlay_paths(wanted: Sequence[Photograph], folder: Path) -> dict[Photograph, Path]:
    """Where each overlay goes. Raises when two would go to the same place."""
    taken: dict[Path, Photograph] = {}
    for photograph in wanted:
        first = taken.setdefault(folder / f"{photograph.name}{OVERLAY_SUFFIX}", photograph)
        if first != photograph:
            raise WTFlowError(
                f"--overlay: {first.path} and {photograph.path} would be written to the same file. "
                "Name the folder that holds both, or score them one after the other."
            )
    return {photograph: path for path, photograph in taken.items()}


def described(bundle: "Bundle") -> dict[str, Any]:
    """What `inspect` says, as plain values."""
    from wtflow import cost

    detector, calibration = bundle.detector(), bundle.calibration
    parameters, operations = cost.parameters(detector), cost.multiply_accumulates(detector)
    return {
        "line": bundle.provenance.get("line"),
        "digest": bundle.digest,
        "bytes": sum(file.stat().st_size for file in bundle.path.iterdir()),
        "parameters": {"backbone": parameters.backbone, "field": parameters.head},
        "gmac_per_image": {part: value / 1e9 for part, value in asdict(operations).items()},
        "latency_ms": {
            **asdict(cost.milliseconds(detector)),
            "measured": f"one image, one thread, median of {cost.REPEATS}, on this machine: {cost.machine()}",
        },
        "cpu_ms": {**asdict(cost.milliseconds(detector, time.thread_time)), "measured": "the same, waiting left out"},
        "calibration": {
            "images": len(calibration.scores),
            "target_fpr": calibration.target_fpr,
            "threshold": calibration.threshold,
            "review_fpr": calibration.review_fpr,
            "review_threshold": calibration.review_threshold,
            "pixel_threshold": calibration.pixel_threshold,
        },
        "settings": bundle.config.model_dump(mode="json"),
        "provenance": bundle.provenance,
    }


def _why(error: ImageError | OSError) -> dict[str, str]:
    if isinstance(error, ImageError):
        return {"reason": error.reason, "message": str(error)}
    return {"reason": "unreadable", "message": error.strerror or str(error)}


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """With the mark at its start by which Excel knows UTF-8."""
    with replacing(path) as draft, draft.open("w", newline="", encoding="utf-8-sig", errors="backslashreplace") as file:
        table = csv.DictWriter(file, ("path", *SAID, "reason", "message", "bundle_digest"))
        table.writeheader()
        table.writerows(rows)


def _write_overlay(path: Path, picture: Image.Image, verdict: "Verdict", detector: "Detector") -> None:
    from wtflow.scoring.anomaly_map import overlay

    drawn = overlay(picture, verdict.anomaly_map, detector.calibration.pixel_threshold)
    with replacing(path) as draft:
        drawn.save(draft, format="PNG", compress_level=1)  # a fifth of the time of Pillow's 6


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    app()
