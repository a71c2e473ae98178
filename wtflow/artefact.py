"""Files that are whole or absent, and digests that say which bytes they are.

Everything that WT-Flow leaves on disk is written under a temporary name beside its place and renamed, so a killed
process leaves either the old file, or the new one, or a `*.tmp-*` that nobody reads. To replace a folder takes two
renames: between them there is none at its place, and the old one is a `*.tmp-*` beside the new one.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from wtflow.errors import WTFlowError

if TYPE_CHECKING:
    from torch import Tensor


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    return sha256_bytes(canonical_json(value).encode())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write (a file, or a folder the caller makes); rename it at the end.

    On an exception the sibling is removed and `path` is as before. A folder at `path` is replaced as a whole; of a link
    the link, not what it points to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        yield draft
        put(draft, path)
    finally:
        _remove(draft)


def put(source: Path, path: Path) -> None:
    """Rename `source`, a file or a folder of the same file system, to `path`, and remove what was there. On an
    exception both are as before."""
    if path.is_dir() and source.is_dir():
        old = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
        path.rename(old)
        try:
            source.rename(path)
        except OSError:
            old.rename(path)
            raise
        _remove(old)
    else:
        source.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` readably and in one step. The same value gives the same bytes."""
    text = json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False)
    with replacing(path) as draft:
        draft.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or broken one raises a `WTFlowError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WTFlowError(f"{path}: not there. Was the stage that makes it run? Try: dvc repro") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WTFlowError(f"{path}: not valid JSON ({error}). Remove it and run the stage again.") from None


def save_tensors(path: Path, named: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, from whichever device and layout they have. The same values give the same bytes,
    if `metadata` has one key at most: safetensors writes several in no fixed order.

    Raises `OSError` with the errno of a write that failed, e.g. ENOSPC.
    """
    from safetensors.torch import save_file  # here: stages that write no tensors need not wait for torch

    whole = {name: value.detach().cpu().contiguous() for name, value in named.items()}
    with replacing(path) as draft:
        draft.touch()
        mode = draft.stat().st_mode
        try:
            save_file(whole, draft, None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise _os_error(error, path) from error
        draft.chmod(mode)  # safetensors leaves a file that only its owner may read


def _os_error(error: SafetensorError, path: Path) -> Exception:
    """What the operating system said, which safetensors reports as text."""
    code = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1])), str(path)) if code else error
