"""Benchmark data sets in miniature: trees of the shape in which each is handed out, filled with real photographs.

Normal images are solar cells of the installed package, 64 x 64 pixels; a defect is a bright bar painted over one.
"""

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.raw_folders import encoded, write

SIDE = 64
BAR = (slice(20, 28), slice(8, 56))


def photographs(first: int = 0, side: int = SIDE) -> Iterator[Image.Image]:
    """Real, normal, each of them once."""
    package = Path(str(getattr(find_spec("elpv_dataset"), "origin", ""))).parent / "data"
    rows = [line.split() for line in (package / "labels.csv").read_text().splitlines()]
    for path, _, _ in [row for row in rows if row[1] == "0.0"][first:]:
        yield Image.open(package / path).convert("RGB").resize((side, side))


def defective(picture: Image.Image) -> Image.Image:
    """The picture with a bar across."""
    pixels = np.array(picture)
    pixels[BAR] = 255
    return Image.fromarray(pixels)


def bar_mask(level: int = 255) -> bytes:
    """The mask of the bar."""
    pixels = np.zeros((SIDE, SIDE), dtype=np.uint8)
    pixels[BAR] = level
    return encoded(Image.fromarray(pixels))


def _good(folder: Path, pictures: Iterator[Image.Image], count: int, name: str = "{:03d}.png") -> None:
    for number in range(count):
        write(folder / name.format(number), encoded(next(pictures)))


def _bad(folder: Path, pictures: Iterator[Image.Image], count: int, name: str = "{:03d}.png") -> list[str]:
    names = [name.format(number) for number in range(count)]
    for one in names:
        write(folder / one, encoded(defective(next(pictures)), "JPEG" if one.endswith("JPG") else "PNG"))
    return [Path(one).stem for one in names]


def mvtec_ad(folder: Path, first: int = 0, train: int = 24) -> None:
    """One category: a defect with masks and one without."""
    pictures = photographs(first)
    _good(folder / "train/good", pictures, train)
    _good(folder / "test/good", pictures, 4)
    for stem in _bad(folder / "test/broken", pictures, 3):
        write(folder / f"ground_truth/broken/{stem}_mask.png", bar_mask())
    write(folder / "license.txt", b"a licence")
    write(folder / "readme.txt", b"read me")


def mpdd(folder: Path, first: int = 0, train: int = 24) -> None:
    """One category, one mask of which is called as its image."""
    mvtec_ad(folder, first, train)
    mask = folder / "ground_truth/broken/001_mask.png"
    mask.rename(mask.with_name("001.png"))


def mvtec_loco(folder: Path, first: int = 0, train: int = 24) -> None:
    """One category; the first logical anomaly has two regions, of two kinds of defects."""
    pictures = photographs(first)
    _good(folder / "train/good", pictures, train)
    _good(folder / "validation/good", pictures, 6)
    _good(folder / "test/good", pictures, 4)
    for defect, level in (("logical_anomalies", 255), ("structural_anomalies", 254)):
        for stem in _bad(folder / f"test/{defect}", pictures, 3):
            write(folder / f"ground_truth/{defect}/{stem}/000.png", bar_mask(level))
    second = np.zeros((SIDE, SIDE), dtype=np.uint8)
    second[40:60, 40:60] = 254
    write(folder / "ground_truth/logical_anomalies/000/001.png", encoded(Image.fromarray(second)))
    kinds = [
        {"defect_name": "missing", "pixel_value": 255, "saturation_threshold": 100, "relative_saturation": False},
        {"defect_name": "scratch", "pixel_value": 254, "saturation_threshold": 0.5, "relative_saturation": True},
    ]
    write(folder / "defects_config.json", json.dumps(kinds).encode())


def mvtec_3d(folder: Path, first: int = 0, train: int = 24) -> None:
    """One category, with point clouds as 32-bit TIFF."""
    pictures = photographs(first)
    cloud = encoded(Image.fromarray(np.zeros((SIDE, SIDE), dtype=np.float32)), "TIFF")
    for place, count in (("train/good", train), ("validation/good", 6), ("test/good", 4)):
        _good(folder / place / "rgb", pictures, count)
    for stem in _bad(folder / "test/crack/rgb", pictures, 3):
        write(folder / f"test/crack/gt/{stem}.png", bar_mask())
    for photograph in sorted(folder.rglob("rgb/*.png")):
        write(photograph.parents[1] / f"xyz/{photograph.stem}.tiff", cloud)
    for number in range(4):
        write(folder / f"test/good/gt/{number:03d}.png", bar_mask(0))
    write(folder / "calibration/camera_parameters.json", b"{}")


def mvtec_ad_2(folder: Path, first: int = 0, train: int = 24) -> None:
    """One category: the public test set under two lights, the private ones without labels."""
    pictures = photographs(first)
    _good(folder / "train/good", pictures, train, "{:03d}_regular.png")
    _good(folder / "validation/good", pictures, 6, "{:03d}_regular.png")
    for light in ("regular", "overexposed"):
        _good(folder / "test_public/good", pictures, 2, f"{{:03d}}_{light}.png")
        for stem in _bad(folder / "test_public/bad", pictures, 2, f"{{:03d}}_{light}.png"):
            write(folder / f"test_public/ground_truth/bad/{stem}_mask.png", bar_mask())
    _good(folder / "test_private", pictures, 3, "{:03d}_regular.png")
    _good(folder / "test_private_mixed", pictures, 3, "{:03d}_mixed.png")


def visa(folder: Path, first: int = 0, train: int = 24) -> None:
    """One object with its own tables, and the split of the whole data set beside it, in ../split_csv."""
    name, pictures = folder.name, photographs(first)
    _good(folder / "Data/Images/Normal", pictures, train + 4, "{:04d}.JPG")
    annotations, split = ["image,label,mask"], []
    for number in range(train + 4):
        path = f"{name}/Data/Images/Normal/{number:04d}.JPG"
        annotations.append(f"{path},normal,")
        split.append(f"{name},{'train' if number < train else 'test'},normal,{path},")
    for stem in _bad(folder / "Data/Images/Anomaly", pictures, 3, "{:03d}.JPG"):
        path, mask = f"{name}/Data/Images/Anomaly/{stem}.JPG", f"{name}/Data/Masks/Anomaly/{stem}.png"
        write(folder.parent / mask, bar_mask(level=1 + int(stem)))
        annotations.append(f'{path},"bent,melt",{mask}' if stem == "001" else f"{path},bent,{mask}")
        split.append(f"{name},test,anomaly,{path},{mask}")
    write(folder / "image_anno.csv", "\n".join(annotations).encode())
    table = folder.parent / "split_csv/1cls.csv"
    before = table.read_text() if table.exists() else "object,split,label,image,mask\n"
    write(table, (before + "\n".join(split) + "\n").encode())


DATA_SETS: dict[str, Callable[[Path, int, int], None]] = {
    "mvtec_ad": mvtec_ad,
    "visa": visa,
    "mpdd": mpdd,
    "mvtec_loco": mvtec_loco,
    "mvtec_3d": mvtec_3d,
    "mvtec_ad_2": mvtec_ad_2,
}
