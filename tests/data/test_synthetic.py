from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny_line import EXTRACT, PREPARE
from wtflow.data.images import ImageLimits, decode, preprocess
from wtflow.data.manifest import Manifest
from wtflow.data.synthetic import KINDS, DefectKind, damaged, write_damaged
from wtflow.errors import WTFlowError

LIMITS = ImageLimits.parse(PREPARE["limits"], "tests")
SIZE = (96, 128)


@pytest.fixture(scope="module")
def cell(tiny_raw: Path) -> np.ndarray:
    """A real solar cell."""
    path = min((tiny_raw / "images").glob("*.png"))
    return preprocess(decode(path.read_bytes(), LIMITS), SIZE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_a_defect_changes_one_place_and_leaves_the_rest(kind: DefectKind, seed: int, cell: np.ndarray) -> None:
    before = cell.copy()
    made = damaged(cell, kind, np.random.default_rng(seed))
    assert (made.shape, made.dtype) == (cell.shape, np.uint8)
    assert np.array_equal(cell, before)
    changed = (made != cell).any(axis=2)
    assert 0 < changed.mean() < 0.2
    rows, columns = np.nonzero(changed)
    box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert box < 0.45 * changed.size
    if kind != "scratch":
        assert changed.sum() > 0.2 * box  # a place, not points all over


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bytes_and_another_one_others(kind: DefectKind, cell: np.ndarray) -> None:
    first, again, other = (damaged(cell, kind, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_blur_takes_detail_and_noise_adds_it(cell: np.ndarray) -> None:
    """Mean square of the second difference, where the image changed."""

    def detail(pixels: np.ndarray, where: np.ndarray) -> float:
        levels = pixels[..., 0].astype(float)
        return float(np.square(np.diff(levels, 2, axis=1))[where[:, 1:-1]].mean())

    for kind, sign in (("blur", -1), ("noise", 1)):
        made = damaged(cell, kind, np.random.default_rng(1))  # type: ignore[arg-type]
        where = (made != cell).any(axis=2)
        assert sign * (detail(made, where) - detail(cell, where)) > 0


def test_copies_of_a_manifest_s_images(tiny_features: Path, tiny_raw: Path, tmp_path: Path) -> None:
    rows = Manifest.read(tiny_features / "data/prepared/tiny/manifest.parquet").rows("calibrate")[:3]
    size = tuple(EXTRACT["backbone"]["image_size"])
    kinds: tuple[DefectKind, ...] = ("noise", "scratch")
    made = write_damaged(rows, tiny_raw, tmp_path, size, LIMITS, kinds, seed=5)
    assert [row["defect"] for row in made] == ["noise", "scratch"] * 3
    assert len({row["image_id"] for row in made}) == 6
    for row in made:
        with Image.open(tmp_path / row["path"]) as picture:
            assert (picture.size, picture.mode) == (size[::-1], "RGB")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    # in another order, one image less, and nothing is made anew
    again = write_damaged(rows[:0:-1], tiny_raw, tmp_path, size, LIMITS, kinds, seed=5)
    assert {row["image_id"] for row in again} < {row["image_id"] for row in made}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == stamps
    fresh = write_damaged(rows[2:], tiny_raw, tmp_path / "fresh", size, LIMITS, kinds, seed=5)
    assert fresh == made[4:]
    other = write_damaged(rows, tiny_raw, tmp_path / "other", size, LIMITS, kinds, seed=6)
    assert not {row["image_id"] for row in made} & {row["image_id"] for row in other}


def test_an_image_that_changed_is_named(tiny_features: Path, tiny_raw: Path, tmp_path: Path) -> None:
    row = Manifest.read(tiny_features / "data/prepared/tiny/manifest.parquet").rows("calibrate")[0]
    (tmp_path / row["path"]).parent.mkdir(parents=True)
    (tmp_path / row["path"]).write_bytes((tiny_raw / row["path"]).read_bytes() + b"x")
    with pytest.raises(WTFlowError, match=rf"{row['path']}: not the bytes of the manifest"):
        write_damaged([row], tmp_path, tmp_path / "made", (64, 64), LIMITS, ["blur"], seed=0)
    (tmp_path / row["path"]).unlink()
    with pytest.raises(WTFlowError, match=rf"{row['path']}: cannot be read \(No such file.*dvc checkout"):
        write_damaged([row], tmp_path, tmp_path / "made", (64, 64), LIMITS, ["blur"], seed=0)
