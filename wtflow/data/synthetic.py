"""Synthetic defects: copies of photographs of good products that are damaged on purpose, to compare settings with.

They are stand-ins: a setting that finds them need not find what goes wrong in a factory. `make bench
NAME=tune_objective` measures how far the two agree. Each kind damages one place of the image:

* `cut-paste`: a piece of the image, 2 to 10 % of it, a little brighter or darker, lies somewhere else;
* `scratch`: a thin bent line, brighter or darker than what is under it;
* `blur`: an ellipse is out of focus;
* `noise`: an ellipse has Gaussian noise.
"""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from wtflow.artefact import replacing, sha256_bytes
from wtflow.data.images import ImageLimits, decode, preprocess
from wtflow.errors import WTFlowError

DefectKind = Literal["cut-paste", "scratch", "blur", "noise"]
Pixels = NDArray[np.uint8]
Levels = NDArray[np.floating[Any]]


def damaged(image_YX3: Pixels, kind: DefectKind, generator: Generator) -> Pixels:
    """A copy of RGB pixels with one defect. The same generator state gives the same bytes."""
    return KINDS[kind](image_YX3, generator)


def cut_paste(image_YX3: Pixels, generator: Generator) -> Pixels:
    """A rectangle of the image, pasted elsewhere in it at another brightness."""
    rows, columns = image_YX3.shape[:2]
    area, ratio = generator.uniform(0.02, 0.1) * rows * columns, np.exp(generator.uniform(-1.0, 1.0))
    height = int(np.clip(np.sqrt(area * ratio), 2, rows - 1))
    width = int(np.clip(np.sqrt(area / ratio), 2, columns - 1))
    (from_y, to_y), (from_x, to_x) = (
        generator.integers(0, rows - height, 2, endpoint=True),
        generator.integers(0, columns - width, 2, endpoint=True),
    )
    piece = image_YX3[from_y : from_y + height, from_x : from_x + width] * _shade(generator, 0.1, 0.25)
    result = image_YX3.copy()
    result[to_y : to_y + height, to_x : to_x + width] = _pixels(piece)
    return result


def scratch(image_YX3: Pixels, generator: Generator) -> Pixels:
    """A bent line, 0.5 to 1.2 % of the shorter side wide and 20 to 60 % of it long."""
    rows, columns = image_YX3.shape[:2]
    side, steps = min(rows, columns), 8
    angles = generator.uniform(0, 2 * np.pi) + np.cumsum(generator.normal(0, 0.25, steps))
    length = generator.uniform(0.2, 0.6) * side / steps
    path = np.cumsum(length * np.stack([np.cos(angles), np.sin(angles)], axis=1), axis=0)
    centre = np.array([columns, rows]) * generator.uniform(0.3, 0.7, 2)
    mask = Image.new("L", (columns, rows))
    width = max(1, round(generator.uniform(0.005, 0.012) * side))
    points = [(float(x), float(y)) for x, y in path - path.mean(axis=0) + centre]
    ImageDraw.Draw(mask).line(points, fill=255, width=width, joint="curve")
    return _blend(image_YX3, image_YX3 * _shade(generator, 0.3, 0.6), mask.filter(ImageFilter.GaussianBlur(0.5)))


def blur(image_YX3: Pixels, generator: Generator) -> Pixels:
    """An ellipse behind a Gaussian of 1 to 2.5 % of the shorter side."""
    radius = generator.uniform(0.01, 0.025) * min(image_YX3.shape[:2])
    soft = np.asarray(Image.fromarray(image_YX3).filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64)
    return _blend(image_YX3, soft, _ellipse(image_YX3, generator))


def noise(image_YX3: Pixels, generator: Generator) -> Pixels:
    """An ellipse with grey noise of 10 to 25 levels."""
    grain = generator.normal(0.0, generator.uniform(10.0, 25.0), image_YX3.shape[:2])
    return _blend(image_YX3, image_YX3 + grain[..., None], _ellipse(image_YX3, generator))


KINDS: Mapping[DefectKind, Callable[[Pixels, Generator], Pixels]] = {
    "cut-paste": cut_paste,
    "scratch": scratch,
    "blur": blur,
    "noise": noise,
}


def write_damaged(
    rows: Sequence[Mapping[str, Any]],
    raw: Path,
    folder: Path,
    size: tuple[int, int],
    limits: ImageLimits,
    kinds: Sequence[DefectKind],
    seed: int,
) -> list[dict[str, Any]]:
    """Damaged copies of the images of manifest `rows`, one of each kind, as PNG of `size` = (height, width) below
    `folder`; returns their rows. What is there already is kept. An image's defects depend on it and the seed alone.

    Raises `WTFlowError` for an image that is not the one of the manifest, or cannot be read.
    """
    made = []
    for row in rows:
        try:
            data = (raw / row["path"]).read_bytes()
        except OSError as error:
            raise WTFlowError(f"{raw / row['path']}: cannot be read ({error.strerror}). Type: dvc checkout") from None
        if sha256_bytes(data) != row["image_id"]:
            raise WTFlowError(f"{raw / row['path']}: not the bytes of the manifest. Type: dvc repro extract")
        clean = preprocess(decode(data, limits), size)
        for kind in kinds:
            path = Path(kind, f"{row['image_id']}.png")
            if not (folder / path).exists():
                place = int(sha256_bytes(f"{kind}:{row['image_id']}".encode()), 16)
                generator = np.random.default_rng([seed, place])
                _write_png(folder / path, damaged(clean, kind, generator))
            made.append(
                {
                    **{key: row[key] for key in ("line", "group")},
                    "image_id": sha256_bytes((folder / path).read_bytes()),
                    "path": str(path),
                    "split": "validate",
                    "label": "anomalous",
                    "defect": kind,
                }
            )
    return made


def _write_png(path: Path, image_YX3: Pixels) -> None:
    stream = BytesIO()
    Image.fromarray(image_YX3).save(stream, "PNG", compress_level=1)
    with replacing(path) as draft:
        draft.write_bytes(stream.getvalue())


def _shade(generator: Generator, least: float, most: float) -> float:
    """A factor of brightness, as often below 1 as above."""
    return 1.0 + float(generator.choice([-1.0, 1.0]) * generator.uniform(least, most))


def _ellipse(image_YX3: Pixels, generator: Generator) -> Image.Image:
    """A soft mask whose axes are 12 to 30 % of the image's sides."""
    rows, columns = image_YX3.shape[:2]
    half = 0.5 * generator.uniform(0.12, 0.3, 2) * [columns, rows]
    x, y = generator.uniform(half, np.array([columns, rows]) - half)
    mask = Image.new("L", (columns, rows))
    ImageDraw.Draw(mask).ellipse((x - half[0], y - half[1], x + half[0], y + half[1]), fill=255)
    return mask.filter(ImageFilter.GaussianBlur(0.01 * min(rows, columns)))


def _blend(image_YX3: Pixels, other_YX3: Levels, mask: Image.Image) -> Pixels:
    share_YX1 = np.asarray(mask, dtype=np.float64)[..., None] / 255.0
    return _pixels(image_YX3 * (1.0 - share_YX1) + other_YX3 * share_YX1)


def _pixels(values: Levels) -> Pixels:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
