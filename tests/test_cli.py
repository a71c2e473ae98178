import asyncio
import base64
import csv
import json
import os
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from serving.scorer import LineScorer, loaded_line
from tests.guards.closure import ROOT
from tests.tiny_line import write_overflowing
from wtflow.bundle import load_bundle
from wtflow.cli import app
from wtflow.data.shards import FeatureShards
from wtflow.scoring.drift import least_replies

SOME = 6


@pytest.fixture(scope="module")
def folder(tiny_raw: Path, tiny_test: FeatureShards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: photographs, in a sub-folder too, and other files. Not to be changed."""
    root = tmp_path_factory.mktemp("photographs")
    (root / "night").mkdir()
    for number, path in enumerate(tiny_test.index["path"].to_pylist()[:SOME]):
        shutil.copyfile(tiny_raw / path, root / ("night" if number % 2 else ".") / f"cell {number} [a].png")
    (root / "notes.txt").write_text("not a photograph")
    (root / ".hidden.png").write_bytes(b"")
    return root


def run(*arguments: str | Path | int) -> tuple[int, str, str]:
    """Exit status, standard output and error of `wtflow`, in this process."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def score(*arguments: str | Path) -> tuple[int, str, str]:
    """`wtflow score` on the one thread that the tests run on."""
    return run("score", "--threads", "1", *arguments)


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_lines_say_what_the_service_says(tiny_bundle: Path, folder: Path) -> None:
    status, out, err = score(tiny_bundle, folder, "--json")
    assert (status, err) == (0, "")
    said = lines(out)
    assert [Path(str(one.pop("path"))) for one in said] == sorted(folder.rglob("cell*.png"))
    service = LineScorer(loaded_line(load_bundle(tiny_bundle), "tiny", "wtflow-tiny", 1))
    for one, path in zip(said, sorted(folder.rglob("cell*.png")), strict=True):
        reply = asyncio.run(service.score(path.read_bytes(), heatmap=False)).model_dump()
        assert one.pop("score") == pytest.approx(reply["score"], rel=0, abs=1e-5)
        keys = ("bundle_digest", "p_value", "threshold", "is_anomalous", "needs_review")
        assert one == {key: reply[key] for key in keys}
    assert len(said) == SOME


def test_the_table_names_every_image_and_its_verdict(tiny_bundle: Path, folder: Path) -> None:
    status, out, err = score(tiny_bundle, *sorted(folder.rglob("cell*.png")))
    assert (status, err) == (0, "")
    for one in lines(score(tiny_bundle, folder, "--json")[1]):
        (row,) = [row for row in out.splitlines() if Path(str(one["path"])).name in row]
        assert f"{one['score']:.4f}" in row
        assert ("anomalous" in row) == one["is_anomalous"]


def test_the_others_are_scored_after_a_bad_image(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    good = next(folder.glob("cell*.png"))
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "text.png").write_text("hello")
    asked = [tmp_path / "cut.png", tmp_path / "gone.png", tmp_path / "text.png", good]
    status, out, err = score(tiny_bundle, *asked, "--json")
    assert status == 1
    assert [one.get("reason") for one in lines(out)] == ["truncated", "unreadable", "not_an_image", None]
    assert {one["bundle_digest"] for one in lines(out)} == {load_bundle(tiny_bundle).digest}
    for path in asked[:3]:
        assert f"error: {path}: " in err
    assert "3 of 4 images could not be scored" in err
    status, out, err = score(tiny_bundle, *asked)
    assert (status, good.name in out, "text.png" in out) == (1, True, False)


def test_a_csv_file_has_a_row_an_image(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    good = tmp_path / "Träger, 1.png"
    shutil.copyfile(next(folder.glob("cell*.png")), good)
    (tmp_path / "text.png").write_text("hello")
    table = tmp_path / "out" / "verdicts.csv"
    assert score(tiny_bundle, good, tmp_path / "text.png", "--csv", table)[0] == 1
    rows = list(csv.DictReader(table.open(encoding="utf-8-sig", newline="")))
    (said,) = lines(score(tiny_bundle, good, "--json")[1])
    assert rows[0] == {**{key: str(value) for key, value in said.items()}, "reason": "", "message": ""}
    assert (rows[1]["path"], rows[1]["reason"], rows[1]["score"]) == (str(tmp_path / "text.png"), "not_an_image", "")
    assert len(rows) == 2
    assert table.read_bytes().startswith("\ufeff".encode())  # else Excel shows a word of two letters for an umlaut

    status, _, err = score(tiny_bundle, good, "--csv", "/proc/verdicts.csv")
    assert (status, "verdicts.csv" in err) == (1, True)


def test_the_others_are_scored_after_one_whose_score_is_not_finite(
    tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    photographs = sorted(folder.rglob("cell*.png"))
    odd = write_overflowing(tiny_bundle, [Image.open(path) for path in photographs], tmp_path / "odd")
    status, out, err = score(tmp_path / "odd", *photographs, "--json")
    assert (status, len(lines(out))) == (1, SOME)
    assert [place for place, one in enumerate(lines(out)) if one.get("reason") == "not_an_image"] == [odd]
    assert [place for place, one in enumerate(lines(out)) if "score" not in one] == [odd]
    assert f"error: {photographs[odd]}: not_an_image: its score is not finite" in err
    assert f"1 of {SOME} images could not be scored" in err


def test_a_name_that_is_not_utf_8_does_not_cost_the_table(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    for name in ("plain.png", os.fsdecode(b"odd\xff.png")):
        shutil.copyfile(next(folder.glob("cell*.png")), tmp_path / name)
    status, out, err = score(tiny_bundle, tmp_path)
    assert (status, err) == (0, "")
    assert "plain.png" in out
    assert r"odd\udcff.png" in out


def test_a_file_without_an_end_is_read_to_the_limit_only(tiny_bundle: Path, folder: Path) -> None:
    status, out, err = score(tiny_bundle, "/dev/zero", next(folder.glob("cell*.png")), "--json")
    assert (status, [one.get("reason") for one in lines(out)]) == (1, ["too_many_bytes", None])
    assert "1 of 2 images could not be scored" in err


def test_an_overlay_that_cannot_be_written_costs_no_verdict(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    long = tmp_path / f"{'a' * 240}.png"
    for path in (long, tmp_path / "b.png"):
        shutil.copyfile(next(folder.glob("cell*.png")), path)
    status, out, err = score(tiny_bundle, tmp_path, "--overlay", tmp_path / "heat")
    assert (status, "aaaa" in out, "b.png" in out) == (1, True, True)
    assert f"error: {tmp_path / 'heat' / long.name}.overlay.png: File name too long" in err
    assert "1 of 2 images could not be scored or drawn" in err
    assert [path.name for path in (tmp_path / "heat").iterdir()] == ["b.png.overlay.png"]


def test_an_overlay_is_the_services_heat_map(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.open(next(folder.glob("cell*.png"))).resize((120, 70)).save(wide)
    assert score(tiny_bundle, folder, wide, "--overlay", tmp_path / "heat")[0] == 0
    written = sorted(path.relative_to(tmp_path / "heat") for path in (tmp_path / "heat").rglob("*") if path.is_file())
    names = [path.relative_to(folder) for path in folder.rglob("cell*.png")] + [Path("wide.png")]
    assert written == sorted(name.with_name(f"{name.name}.overlay.png") for name in names)
    service = LineScorer(loaded_line(load_bundle(tiny_bundle), "tiny", "wtflow-tiny", 1))
    heatmap = asyncio.run(service.score(wide.read_bytes(), heatmap=True)).heatmap
    assert heatmap is not None
    pixels = [np.asarray(Image.open(BytesIO(data))) for data in (base64.b64decode(heatmap), overlay_of(wide, tmp_path))]
    assert pixels[0].shape == (70, 120, 3)
    np.testing.assert_array_equal(*pixels)
    # the overlays do not become photographs when the folder is scored again
    assert len(lines(score(tiny_bundle, tmp_path, "--json")[1])) == 1


def overlay_of(path: Path, root: Path) -> bytes:
    return (root / "heat" / f"{path.name}.overlay.png").read_bytes()


def test_an_overlay_is_written_with_the_fastest_compression(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    path = next(folder.glob("cell*.png"))
    assert score(tiny_bundle, path, "--overlay", tmp_path / "heat")[0] == 0
    _, _, pixels = overlay_of(path, tmp_path).partition(b"IDAT")
    assert pixels[:2] == b"\x78\x01"  # zlib's header; its level 6 writes 78 9c


def test_two_overlays_do_not_overwrite_each_other(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    same = tmp_path / next(folder.glob("cell*.png")).name
    shutil.copyfile(next(folder.glob("cell*.png")), same)
    status, out, err = score(tiny_bundle, folder, same, "--overlay", tmp_path / "heat")
    assert (status, out) == (1, "")
    assert "written to the same file" in err
    assert not (tmp_path / "heat").exists()


@pytest.mark.parametrize("command", ["score", "inspect"])
def test_what_is_no_bundle_is_explained(command: str, folder: Path, tmp_path: Path) -> None:
    image = [next(folder.glob("cell*.png"))] if command == "score" else []
    for place in (tmp_path / "gone", folder / "notes.txt"):
        status, out, err = run(command, place, *image)
        assert (status, out) == (1, "")
        assert err.startswith(f"error: {place}/bundle.json: ")
        assert err.count("\n") == 1


def test_a_folder_without_photographs_and_a_wrong_option_are_explained(tiny_bundle: Path, tmp_path: Path) -> None:
    status, _, err = score(tiny_bundle, tmp_path)
    assert (status, "no photograph in this folder" in err) == (1, True)
    status, _, err = score(tiny_bundle, tmp_path, "--threads", "-1")
    assert (status, "--threads" in err, "Traceback" in err) == (2, True, False)
    status, _, err = run("score", tiny_bundle)
    assert (status, "IMAGE" in err) == (2, True)


def test_inspect_says_what_the_bundle_is(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    status, out, _ = run("inspect", tiny_bundle, "--json")
    assert status == 0
    facts = json.loads(out)
    assert (facts["line"], facts["digest"]) == ("tiny", bundle.digest)
    assert facts["settings"] == bundle.config.model_dump(mode="json")
    assert facts["provenance"] == bundle.provenance
    assert facts["calibration"]["images"] == len(bundle.calibration.scores)
    assert facts["calibration"]["threshold"] == bundle.calibration.threshold
    assert facts["bytes"] == sum(path.stat().st_size for path in tiny_bundle.iterdir())
    detector = bundle.detector()
    for part, network in (("backbone", detector.backbone.network), ("field", detector.scorer.field)):
        assert facts["parameters"][part] == sum(weight.numel() for weight in network.parameters())
    assert min(facts["latency_ms"][part] for part in ("backbone", "head")) > 0
    status, table, _ = run("inspect", tiny_bundle)
    assert status == 0
    assert bundle.digest in table
    assert "on this machine" in table


@pytest.mark.slow
def test_drift_tells_turned_photographs_from_others(
    tiny_bundle: Path, tiny_raw: Path, tiny_fit: FeatureShards, tmp_path: Path
) -> None:
    """Photographs that calibrated, and the same turned by a quarter."""
    calibrate = [tiny_raw / tiny_fit.index["path"][row].as_py() for row in tiny_fit.rows(split="calibrate")]
    replies = {}
    for name, degrees in (("as before", 0), ("turned", 90)):
        (tmp_path / name).mkdir()
        for path in calibrate:
            Image.open(path).rotate(degrees).save(tmp_path / name / path.name)
        replies[name] = tmp_path / f"{name}.jsonl"
        replies[name].write_text(score(tiny_bundle, tmp_path / name, "--json")[1])
    status, out, err = run("drift", tiny_bundle, replies["as before"])
    assert (status, err) == (0, "")
    assert "as calibrated" in out
    status, out, _ = run("drift", tiny_bundle, replies["turned"], "--json")
    (batch,) = json.loads(out)
    assert (status, batch["shift"], batch["images"]) == (3, "higher", len(calibrate))


def test_drift_explains_what_is_no_reply(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "replies.jsonl").write_text("score 3\n")
    status, _, err = run("drift", tiny_bundle, tmp_path / "replies.jsonl")
    assert status == 1
    assert "replies.jsonl: reply 1 is not one of the service" in err
    assert run("drift", tiny_bundle, tmp_path / "nowhere.jsonl")[0] == 2


def test_drift_says_when_a_batch_is_too_small_to_be_called_shifted(tiny_bundle: Path, tmp_path: Path) -> None:
    replies = tmp_path / "replies.jsonl"
    replies.write_text('{"score": 1e9}\n' * 30)
    status, out, err = run("drift", tiny_bundle, replies, "--every", "1")
    assert (status, "as calibrated" in out, err.count("\n")) == (0, True, 1)
    least = least_replies(load_bundle(tiny_bundle).calibration, 0.001)
    assert f"{replies}: replies in the newest batch: 1. At level 0.001 no batch of fewer than {least} can" in err
    assert run("drift", tiny_bundle, replies, "--every", least)[::2] == (3, "")


def test_replies_of_another_bundle_are_not_compared(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    replies = tmp_path / "replies.jsonl"
    replies.write_text(score(tiny_bundle, folder, "--json")[1])
    write_overflowing(tiny_bundle, [Image.open(path) for path in folder.rglob("cell*.png")], tmp_path / "other")
    status, _, err = run("drift", tmp_path / "other", replies)
    assert (status, f"among {SOME} lines" in err) == (1, True)


def helped(stdout: int, unbuffered: str = "") -> tuple[int, str]:
    """Exit status and standard error of a program whose help goes to `stdout`."""
    command = [sys.executable, "-m", "wtflow.cli", "score", "--help"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize(("unbuffered", "what"), [("", "standard output"), ("1", "standard output or a file")])
def test_a_full_disk_behind_standard_output_is_said_once(unbuffered: str, what: str) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    assert helped(full, unbuffered) == (1, f"error: {what}: No space left on device\n")
    os.close(full)


def test_a_file_that_opens_and_cannot_be_read_is_an_error(tiny_bundle: Path) -> None:
    status, _, err = run("drift", tiny_bundle, "/proc/self/mem")
    assert (status, err) == (1, "error: standard output or a file: Input/output error\n")


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert helped(writer) == (1, "")
    os.close(writer)


@pytest.mark.slow
def test_it_is_a_program(tiny_bundle: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "wtflow.cli"]
    helped = subprocess.run([*command, "score", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "wtflow score models/solar-mono cell.png" in helped.stdout
    asked = [*command, "score", str(tiny_bundle), str(folder / "notes.txt")]
    refused = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout, "Traceback" in refused.stderr) == (1, "", False)
    assert "not_an_image" in refused.stderr


@pytest.mark.parametrize("group", [(), ("cache",)])
def test_the_list_of_commands_is_not_cut_off(group: tuple[str, ...]) -> None:
    status, shown, _ = run(*group, "--help")
    assert status == 0
    assert "..." not in shown.partition("Commands:")[2]


def test_the_help_of_score_names_its_arguments_once() -> None:
    status, shown, _ = run("score", "--help")
    assert status == 0
    assert "{IMAGE}..." in shown
    assert "its heat map laid over it" in shown
