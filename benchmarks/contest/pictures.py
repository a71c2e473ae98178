"""The images of a line as every contender sees them: decoded and resized once, by the project's one preprocessing."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.product_lines import PLACE, ProductLine
from wtflow.artefact import digest_of, save_tensors
from wtflow.data.images import decode, preprocess

SPLITS = ("train", "calibrate", "test")


def rows_of(line: ProductLine, split: str) -> list[dict[str, Any]]:
    """Manifest rows of a split, in the order of its images. Uncertain ones are left out: no figure knows them."""
    return [row for row in line.manifest.rows(split) if row["label"] != "uncertain"]  # type: ignore[arg-type]


def split_digest(line: ProductLine) -> str:
    """Which images are in which split, and at which size: what every contender's result depends on."""
    images = {split: [[row["image_id"], row["label"]] for row in rows_of(line, split)] for split in SPLITS}
    return digest_of([images, line.extract_params.backbone.image_size])


def write_pictures(line: ProductLine) -> Path:
    """A folder with a file a split, {"images": N x Y x X x 3 uint8}; kept for the next time."""
    folder = PLACE / "pictures" / f"{line.name}-{split_digest(line)[:12]}"
    size, limits = line.extract_params.backbone.image_size, line.prepare_params.limits

    def read(row: dict[str, Any]) -> np.ndarray:
        return preprocess(decode((line.raw / row["path"]).read_bytes(), limits), size)

    for split in SPLITS:
        path = folder / f"{split}.safetensors"
        if not path.exists():
            with ThreadPoolExecutor() as pool:
                images = list(pool.map(read, rows_of(line, split)))
            save_tensors(path, {"images": torch.from_numpy(np.stack(images))})
    return folder


def read_pictures(folder: Path, split: str) -> torch.Tensor:
    """N x Y x X x 3 uint8."""
    images_NYX3: torch.Tensor = load_file(folder / f"{split}.safetensors")["images"]
    return images_NYX3
