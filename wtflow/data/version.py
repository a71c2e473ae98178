"""Which data this is: the hash that DVC gives a folder.

DVC hashes every file with MD5 and the folder with the MD5 of the JSON list of its files. It is computed
here again, so that the model library can name its data on a machine that has no DVC.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from wtflow.data.tree import files
from wtflow.errors import WTFlowError


def data_version(folder: Path, known: Mapping[str, str] | None = None) -> str:
    """`<md5>.dir`, equal to the `md5:` that `dvc add` writes for `folder` (and to `dvc.lock`'s).

    `known` holds the MD5 of files that were read already, by relative path. Patterns of a `.dvcignore`
    are not applied: do not let one match below a data folder.
    """
    if not folder.is_dir():
        raise WTFlowError(f"{folder}: no such folder. Bring the data (dvc pull, or dvc repro fetch), then try again.")
    md5s = known or {}
    entries = [{"md5": md5s.get(path) or _md5(folder / path), "relpath": path} for path in files(folder)]
    return md5_bytes(json.dumps(entries, sort_keys=True).encode()) + ".dir"


def md5_bytes(data: bytes) -> str:
    """Hexadecimal MD5: an address, as DVC uses it, not a protection against forgery."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _md5(path: Path) -> str:
    try:
        if not path.is_file():
            raise WTFlowError(f"{path}: a broken link or a special file, which has no version. Remove it.")
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise WTFlowError(f"{path}: cannot be read ({error.strerror}). Mend its permissions or remove it.") from None
