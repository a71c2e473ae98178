"""What was seen of photographs that were decoded before: of a line that grows the new ones are decoded, of the others
only the bytes are read.

    key = SHA-256 of the photograph's bytes; all hold for one decoder: its code, Pillow's version, the limits

They are kept in a folder of a line's own, as `<SHA-256 of the file>.parquet`. Nothing depends on them but time: a file
of another decoder, or one whose name is not its digest, counts as absent.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from wtflow.artefact import digest_of, replacing, sha256_bytes, sha256_file
from wtflow.data import images, likeness
from wtflow.data.images import ImageLimits, decode

SCHEMA = pa.schema(
    [("image_id", pa.string()), ("width", pa.int32()), ("height", pa.int32()), ("thumbnail", pa.binary())]
)
logger = logging.getLogger(__name__)


class Look(NamedTuple):
    """At a whole image."""

    image_id: str
    """SHA-256 of the file's bytes."""
    width: int
    height: int
    thumbnail_YX: NDArray[np.uint8]
    """See `wtflow.data.likeness`."""


class Looks:
    """Those at the photographs of a line: taken by this process and, if `folder` has them, before."""

    def __init__(self, limits: ImageLimits, folder: Path | None = None) -> None:
        self._limits, self._folder = limits, folder
        code = [sha256_file(Path(str(module.__file__))) for module in (images, likeness)]
        self._decoder = digest_of([*code, PIL.__version__, limits.model_dump(mode="json")])
        self._known = _read(folder, self._decoder) if folder else {}
        self._taken: dict[str, Look] = {}

    def at(self, data: bytes) -> Look:
        """The bytes of a photograph. Raises `ImageError` as `decode` does. Threads may share it."""
        image_id = sha256_bytes(data)
        look = self._taken.get(image_id) or self._known.get(image_id)
        if look is None:
            picture = decode(data, self._limits)
            look = Look(image_id, *picture.size, likeness.thumbnail(picture))
        self._taken[image_id] = look
        return look

    def keep(self) -> None:
        """Write down those that were asked for, and forget the others."""
        if self._folder is None:
            return
        taken = self._taken.values()
        columns = [[getattr(look, name) for look in taken] for name in SCHEMA.names[:3]]
        thumbnails = [look.thumbnail_YX.tobytes() for look in taken]
        table = pa.table([*columns, thumbnails], schema=SCHEMA.with_metadata({"decoder": self._decoder}))
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        data = buffer.getvalue().to_pybytes()
        kept = self._folder / f"{sha256_bytes(data)}.parquet"
        with replacing(kept) as draft:
            draft.write_bytes(data)
        for path in self._folder.glob("*.parquet"):  # no drafts: another process may be writing one
            if path != kept:
                path.unlink(missing_ok=True)


def _read(folder: Path, decoder: str) -> dict[str, Look]:
    found, side = dict[str, Look](), likeness.SIDE
    for path in folder.glob("*.parquet"):
        try:
            if sha256_file(path) != path.stem:
                logger.warning("%s is damaged: its photographs are decoded again", path)
                continue
            table = pq.read_table(path)
        except OSError:  # another process has removed it
            continue
        if table.schema.metadata[b"decoder"] != decoder.encode():
            continue
        for image_id, width, height, thumbnail in zip(*(column.to_pylist() for column in table.columns), strict=True):
            found[image_id] = Look(image_id, width, height, np.frombuffer(thumbnail, np.uint8).reshape(side, side))
    return found
