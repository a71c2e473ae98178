import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.data_sets import photographs
from tests.data.raw_folders import encoded, fill, noise, params, plain_folder, write
from wtflow.data.manifest import FINDINGS_SCHEMA, MANIFEST_SCHEMA, REJECTED_SCHEMA
from wtflow.data.prepare import Prepared, prepare
from wtflow.data.version import data_version
from wtflow.errors import WTFlowError


def reasons(prepared: Prepared) -> dict[str, str]:
    return {row["path"]: row["reason"] for row in prepared.rejected.to_pylist()}


def by_path(prepared: Prepared) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in prepared.manifest.rows()}


def test_a_plain_folder(tmp_path: Path) -> None:
    prepared = prepare(plain_folder(tmp_path / "raw"), "alpha", params())
    rows = prepared.manifest.rows()
    assert prepared.manifest.table.schema.equals(MANIFEST_SCHEMA)
    assert prepared.rejected.schema.equals(REJECTED_SCHEMA)
    assert (len(rows), prepared.rejected.num_rows) == (33, 0)
    assert {row["split"] for row in rows if row["label"] == "normal"} == {"train", "calibrate", "test"}
    assert {(row["split"], row["defect"]) for row in rows if row["label"] == "anomalous"} == {("test", "scratch")}
    assert {row["line"] for row in rows} == {"alpha"}
    assert prepared.manifest.data_version == data_version(tmp_path / "raw")


def test_the_same_folder_gives_the_same_manifest(tmp_path: Path) -> None:
    first = prepare(plain_folder(tmp_path / "raw"), "alpha", params())
    shutil.copytree(tmp_path / "raw", tmp_path / "copy")
    assert prepare(tmp_path / "copy", "alpha", params()).manifest.digest == first.manifest.digest


def test_copies_leave_the_first_by_path(tmp_path: Path) -> None:
    raw = plain_folder(tmp_path / "raw")
    shutil.copy(raw / "good/003.png", raw / "good/900.png")
    shutil.copy(raw / "good/003.png", raw / "good/000a.png")
    shutil.copy(raw / "bad/scratch/001.png", raw / "bad/scratch/000a.png")
    prepared = prepare(raw, "alpha", params())
    expected = {"good/003.png": "duplicate", "good/900.png": "duplicate", "bad/scratch/001.png": "duplicate"}
    assert reasons(prepared) == expected
    assert prepared.rejected.to_pylist()[-1]["detail"] == "of good/000a.png"


@pytest.mark.parametrize(
    ("masks", "kept"),
    [
        ({"dent": (0, 4), "scratch": (9, 12)}, "dent"),
        ({"scratch": (9, 12)}, "scratch"),
        ({"dent": (0, 0), "scratch": (9, 12)}, "scratch"),
        ({}, "dent"),
    ],
)
def test_copies_of_two_defects_or_masks_are_told(tmp_path: Path, masks: dict[str, tuple[int, int]], kept: str) -> None:
    raw = plain_folder(tmp_path / "raw", bad=0)
    for defect in ("dent", "scratch"):
        write(raw / f"bad/{defect}/1.png", encoded(noise(99)))
    for defect, (start, stop) in masks.items():
        rows = np.zeros((16, 20), dtype=np.uint8)
        rows[start:stop] = 255
        write(raw / f"masks/{defect}/1.png", encoded(Image.fromarray(rows)))
    prepared = prepare(raw, "alpha", params())
    (left_out,) = {"dent", "scratch"} - {kept}
    row = by_path(prepared)[f"bad/{kept}/1.png"]
    assert (row["defect"], row["mask_path"]) == (kept, f"masks/{kept}/1.png" if kept in masks else None)
    assert reasons(prepared) == {f"bad/{left_out}/1.png": "duplicate"}
    (finding,) = prepared.findings.to_pylist()
    assert (finding["path"], finding["finding"]) == (f"bad/{kept}/1.png", "copies_differ")
    for defect in ("dent", "scratch"):
        mask = f"mask masks/{defect}/1.png" if defect in masks else "no mask"
        assert f"bad/{defect}/1.png ({defect}, {mask})" in finding["detail"]


def test_copies_that_say_the_same_are_no_finding(tmp_path: Path) -> None:
    raw = plain_folder(tmp_path / "raw", bad=0)
    for name in ("1", "2"):
        write(raw / f"bad/dent/{name}.png", encoded(noise(99)))
        write(raw / f"masks/dent/{name}.png", encoded(noise(98)))
    prepared = prepare(raw, "alpha", params())
    assert prepared.findings.num_rows == 0
    assert reasons(prepared) == {"bad/dent/2.png": "duplicate"}


def test_copies_that_contradict_each_other_all_go(tmp_path: Path) -> None:
    raw = plain_folder(tmp_path / "raw")
    for name in ("bad/scratch/copy.png", "good/copy.png"):
        shutil.copy(raw / "good/003.png", raw / name)
    found = reasons(prepare(raw, "alpha", params()))
    expected = ("bad/scratch/copy.png", "good/003.png", "good/copy.png")
    assert found == dict.fromkeys(expected, "contradictory")


def test_an_image_whose_mask_is_bad_still_contradicts_its_copy(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    fill(raw, [f"train/good/{number:02d}.png" for number in range(20)])
    fill(raw, [f"test/good/{number:02d}.png" for number in range(3)], first_seed=50)
    fill(raw, ["ground_truth/dent/orphan_mask.png"], first_seed=80)
    write(raw / "test/dent/x.png", (raw / "train/good/07.png").read_bytes())
    write(raw / "test/dent/y.png", encoded(noise(99)))
    assert reasons(prepare(raw, "alpha", params(layout="mvtec_ad"))) == {
        "ground_truth/dent/orphan_mask.png": "not_in_layout",
        "test/dent/x.png": "contradictory",
        "train/good/07.png": "contradictory",
        "test/dent/y.png": "bad_mask",
    }


def test_the_data_set_s_own_split_is_kept(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    fill(raw, [f"train/good/{number:02d}.png" for number in range(20)])
    fill(raw, ["test/good/00.png", "test/dent/00.png", "ground_truth/dent/00_mask.png"], first_seed=50)
    rows = by_path(prepare(raw, "alpha", params(layout="mvtec_ad", test_fraction=0.6)))
    assert {row["split"] for path, row in rows.items() if path.startswith("train/")} == {"train", "calibrate"}
    assert rows["test/good/00.png"]["split"] == rows["test/dent/00.png"]["split"] == "test"
    assert rows["test/dent/00.png"]["mask_path"] == "ground_truth/dent/00_mask.png"


def test_a_group_that_the_own_split_tears_stops_the_stage(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    fill(raw, [f"train/good/view{number:02d}_1.png" for number in range(20)])
    fill(raw, ["test/good/view03_2.png"], first_seed=50)
    views = params(layout="mvtec_ad", group_pattern=r"(view\d+)")
    with pytest.raises(WTFlowError, match=r"group 'view03' are in .* and .*group_pattern"):
        prepare(raw, "alpha", views)


def own_splits(raw: Path) -> Path:
    """Layout `mvtec_loco` without anomalies, filled with noise."""
    for place, count, seed in (("train", 20, 0), ("validation", 5, 100), ("test", 5, 200)):
        fill(raw, [f"{place}/good/{number:02d}.png" for number in range(count)], first_seed=seed)
    write(raw / "defects_config.json", b"[]")
    (raw / "ground_truth").mkdir()
    return raw


def test_of_the_same_bytes_in_two_splits_the_test_s_stays(tmp_path: Path) -> None:
    raw = own_splits(tmp_path / "raw")
    shutil.copy(raw / "test/good/01.png", raw / "train/good/a.png")
    shutil.copy(raw / "validation/good/01.png", raw / "train/good/b.png")
    shutil.copy(raw / "test/good/02.png", raw / "validation/good/c.png")
    found = prepare(raw, "alpha", params(layout="mvtec_loco")).rejected.to_pylist()
    assert {row["path"]: (row["reason"], row["detail"]) for row in found} == {
        "train/good/a.png": ("duplicate", "of test/good/01.png, which is in test: it may not be in train too"),
        "train/good/b.png": (
            "duplicate",
            "of validation/good/01.png, which is in calibrate: it may not be in train too",
        ),
        "validation/good/c.png": ("duplicate", "of test/good/02.png, which is in test: it may not be in calibrate too"),
    }


def test_a_near_duplicate_in_another_split_is_reported_and_kept(tmp_path: Path) -> None:
    raw, pictures = own_splits(tmp_path / "raw"), photographs()
    for path in sorted(raw.rglob("*.png")):
        write(path, encoded(next(pictures)))
    write(raw / "test/good/again.jpg", encoded(Image.open(raw / "train/good/07.png"), "JPEG", quality=80))
    found = prepare(raw, "alpha", params(layout="mvtec_loco", max_rejected_fraction=0.0))
    assert found.findings.schema.equals(FINDINGS_SCHEMA)
    (row,) = found.findings.to_pylist()
    assert (row["path"], row["line"], row["finding"]) == ("test/good/again.jpg", "alpha", "near_duplicate")
    assert "in test, nearly train/good/07.png in train (likeness 0.99" in row["detail"]
    assert "several exposures or angles of a part are not: prepare.group_pattern" in row["detail"]
    assert by_path(found)["test/good/again.jpg"]["split"] == "test"


def test_what_the_layout_passes_over_is_rejected_not_lost(tmp_path: Path) -> None:
    raw = plain_folder(tmp_path / "raw")
    fill(raw, ["Good/misspelt.JPG", "stray.png"], first_seed=500)
    fill(tmp_path, ["elsewhere/a.png"])
    (raw / "good/more").symlink_to(tmp_path / "elsewhere")
    (raw / "good/one.png").symlink_to(tmp_path / "elsewhere/a.png")
    write(raw / "readme.txt", b"not an image, and nobody said so")
    write(raw / "good/notes.txt", b"this one says it is")
    assert reasons(prepare(raw, "alpha", params())) == {
        "Good/misspelt.JPG": "not_in_layout",
        "stray.png": "not_in_layout",
        "good/more": "linked_folder",
        "good/one.png": "outside",
        "good/notes.txt": "not_an_image",
    }


def test_too_many_rejected_stop_the_stage(tmp_path: Path) -> None:
    raw = plain_folder(tmp_path / "raw", good=27, bad=0)
    for number in range(3):
        write(raw / f"good/cut{number}.png", encoded(noise(number))[:100])
    prepare(raw, "alpha", params(max_rejected_fraction=0.1))
    with pytest.raises(
        WTFlowError, match=r"3 of 30 images rejected \(3 truncated\)[\s\S]*\n  good/cut0\.png: truncated"
    ) as caught:
        prepare(raw, "alpha", params(max_rejected_fraction=0.099))
    assert "max_rejected_fraction" in str(caught.value)


@pytest.mark.parametrize(
    ("good", "changes", "message"),
    [
        (0, {}, "finds no image there"),
        (30, {"group_pattern": "(0)"}, "no normal image falls to .*; normals form 1 groups"),
        (30, {"test_fraction": 0.0}, "falls to test;"),
        (30, {"calibrate_fraction": 1e-9}, "falls to calibrate;"),
        (30, {"test_fraction": 0.9, "calibrate_fraction": 0.0999999}, "falls to train;"),
    ],
)
def test_an_empty_split_stops_the_stage(tmp_path: Path, good: int, changes: dict[str, Any], message: str) -> None:
    raw = plain_folder(tmp_path / "raw", good, bad=0)
    (raw / "good").mkdir(parents=True, exist_ok=True)
    with pytest.raises(WTFlowError, match=message):
        prepare(raw, "alpha", params(**changes))


@pytest.mark.parametrize(
    ("layout", "gone", "message"),
    [
        (
            "mvtec_ad",
            "test",
            r"falls to calibrate and test; .*\. The data set has its own split: add normal images to its own test\.$",
        ),
        ("mvtec_ad", None, r"falls to calibrate; .*\. Add images to .* own train, .* calibrate_fraction or salt\.$"),
        ("mvtec_loco", "validation", r"falls to calibrate; .*: add normal images to its own calibrate\.$"),
    ],
)
def test_where_the_data_set_has_its_own_split_no_fraction_is_blamed(
    tmp_path: Path, layout: str, gone: str | None, message: str
) -> None:
    raw = own_splits(tmp_path / "raw")
    for path in (raw / f"{gone}/good").glob("*") if gone else ():
        path.write_bytes(b"damaged")
    with pytest.raises(WTFlowError, match=message):
        prepare(raw, "alpha", params(layout=layout, calibrate_fraction=1e-9))


def test_a_missing_source_says_how_to_bring_it(tmp_path: Path) -> None:
    with pytest.raises(WTFlowError, match=r"raw: no such folder.*dvc add"):
        prepare(tmp_path / "raw", "alpha", params())


def test_progress_counts_every_image(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    prepare(plain_folder(tmp_path / "raw"), "alpha", params(), lambda done, total: heard.append((done, total)))
    assert heard == [(done, 33) for done in range(1, 34)]


@pytest.mark.slow
def test_a_folder_that_dvc_links_to_its_cache(tmp_path: Path) -> None:
    raw = plain_folder(tmp_path / "raw")
    plain = prepare(raw, "alpha", params())
    for words in (["init", "--no-scm"], ["config", "cache.type", "symlink"], ["add", "raw"]):
        subprocess.run([sys.executable, "-m", "dvc", "-q", *words], cwd=tmp_path, check=True)
    assert (raw / "good/000.png").is_symlink()
    assert prepare(raw, "alpha", params()).manifest.digest == plain.manifest.digest


KINDS = ("whole", "whole", "whole", "cut", "text", "empty", "copy", "copy of the other label", "hidden", "misplaced")
ITEMS = st.lists(st.tuples(st.sampled_from(["good", "bad"]), st.integers(0, 9), st.sampled_from(KINDS)), max_size=12)


def add(raw: Path, items: Iterable[tuple[str, int, str]], first_seed: int) -> int:
    """Write one file an item, named after its group; returns how many of them are visible."""
    visible = 0
    for number, (label, group, kind) in enumerate(items):
        data = encoded(noise(first_seed + number))
        name = f"{label}/lot{group}-{first_seed + number}.png"
        match kind:
            case "cut":
                data = data[:100]
            case "text":
                data = f"text {first_seed + number}".encode()
            case "empty":
                data = b""
            case "copy" | "copy of the other label":
                other = {"good": "bad", "bad": "good"}[label]
                name = f"{label if kind == 'copy' else other}/lot{group}-{first_seed + number}.png"
                data = encoded(noise(group if label == "good" else 1_000 + group))
            case "hidden":
                name = f"{label}/.lot{group}-{first_seed + number}.png"
            case "misplaced":
                name = f"ugly/lot{group}-{first_seed + number}.png"
        write(raw / name, data)
        visible += kind != "hidden"
    return visible


def sound_folder(raw: Path) -> int:
    """Groups lot0 to lot9 with two good images each, and some bad ones."""
    fill(raw, [f"good/lot{number % 10}-{number}.png" for number in range(20)])
    fill(raw, [f"bad/lot{number}-{number}.png" for number in range(10)], first_seed=1_000)
    return 30


LOTS = params(group_pattern="(lot[0-9]+)")


@settings(deadline=None, max_examples=20)
@given(ITEMS)
def test_counts_add_up_and_groups_stay_whole(items: list[tuple[str, int, str]]) -> None:
    with TemporaryDirectory() as folder:
        raw = Path(folder)
        found = sound_folder(raw) + add(raw, items, first_seed=5_000)
        prepared = prepare(raw, "alpha", LOTS)
    rows = prepared.manifest.rows()
    assert len(rows) + prepared.rejected.num_rows == found
    assert not {row["path"] for row in rows} & set(reasons(prepared))
    assert len({row["image_id"] for row in rows}) == len(rows)
    assert all(row["split"] == "test" for row in rows if row["label"] != "normal")
    splits = defaultdict(set)
    for row in rows:
        if row["label"] == "normal":
            splits[row["group"]].add(row["split"])
    assert all(len(where) == 1 for where in splits.values())


@settings(deadline=None, max_examples=20)
@given(ITEMS, ITEMS)
def test_new_images_never_move_old_ones(before: list[tuple[str, int, str]], added: list[tuple[str, int, str]]) -> None:
    with TemporaryDirectory() as folder:
        raw = Path(folder)
        sound_folder(raw)
        add(raw, before, first_seed=5_000)
        old = prepare(raw, "alpha", LOTS).manifest
        add(raw, [item for item in added if "copy" not in item[2]], first_seed=100)
        new = {row["image_id"]: row for row in prepare(raw, "alpha", LOTS).manifest.rows()}
    assert [new[row["image_id"]] for row in old.rows()] == old.rows()
