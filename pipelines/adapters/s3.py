"""A folder of a bucket, brought here: listed, downloaded in parallel, each object checked, interrupted runs continued.

Any server that speaks S3. Credentials, region and endpoint come from the usual AWS_* variables or files. Requests that
fail for a passing reason are repeated, by this module alone (botocore's own retries are off), and counted.
"""

import hashlib
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from threading import Event, Lock
from typing import Any, TypeVar

import boto3
from botocore import exceptions as boto
from botocore.config import Config
from botocore.httpchecksum import StreamingChecksumBody
from botocore.parsers import ResponseParserError
from pydantic import PositiveFloat, PositiveInt
from pydantic_settings import SettingsConfigDict
from urllib3.exceptions import HTTPError

from pipelines.environment import Settings
from wtflow.artefact import replacing
from wtflow.errors import WTFlowError

URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?")
MD5 = re.compile(r"[0-9a-f]{32}")
PARTS = re.compile(r"[0-9a-f]{32}-([0-9]+)")
CHUNK = 1 << 20
PAGE = 1000
"""Objects of a page of the listing."""
USUAL_PARTS = tuple(mebibytes << 20 for mebibytes in (5, 8, 10, 15, 16, 25, 32, 50, 64, 100, 128, 256, 512, 1024))
"""Sizes of the parts in which the usual programmes upload."""
EXPIRED = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
"""Codes of credentials that are refused with status 400."""
AT_ONCE = 10_000
"""Objects that wait for a connection at the same time: what a queue of a million would take of memory."""

T = TypeVar("T")


class S3Settings(Settings):
    """`WTFLOW_S3_<NAME>` in the environment: how a bucket is read, never what is read."""

    model_config = SettingsConfigDict(env_prefix="WTFLOW_S3_")

    connections: PositiveInt = 8
    """Downloads at once."""
    timeout: PositiveFloat = 60.0
    """Seconds without a byte after which a request counts as failed."""
    attempts: PositiveInt = 10
    """Times that one object, or one page of the listing, is asked for."""
    pause: PositiveFloat = 0.5
    """Seconds before the first repetition, on average; doubled each time, 20 at most."""


class DamagedError(Exception):
    """Bytes that are not those of the object: passing, as far as anybody knows."""


PASSING = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    ResponseParserError,
    HTTPError,
    ConnectionError,
    TimeoutError,
    DamagedError,
)
"""Failures that may pass by themselves, beside answers with a status that says so."""


@dataclass(frozen=True)
class S3Object:
    """An object of the listing, and the file that it becomes."""

    key: str
    path: str
    """Below the folder, with slashes."""
    size: int
    etag: str


@dataclass
class Fetched:
    """What a run brought, and what it took."""

    objects: int = 0
    bytes: int = 0
    here_already: int = 0
    """Objects of an earlier run, checked again and not downloaded."""
    by_size_alone: int = 0
    """Objects for which the server gives no checksum that can be checked here."""
    not_files: list[str] = field(default_factory=list)
    """Keys that cannot be names of files in the folder, and are left out."""
    repeated: Counter[str] = field(default_factory=Counter)
    """Requests that were repeated, by what went wrong."""


class Bucket:
    """One `s3://bucket/prefix`."""

    def __init__(self, url: str, settings: S3Settings) -> None:
        match = URL.fullmatch(url)
        if match is None:
            raise WTFlowError(f"{url!r}: not the address of a bucket. Write s3://bucket or s3://bucket/prefix.")
        self.url, self.settings = url, settings
        self.bucket, prefix = match[1], (match[2] or "").strip("/")
        self.prefix = f"{prefix}/" if prefix else ""
        self.fetched = Fetched()
        self._unexplained: dict[str, str] = {}
        self._lock, self._stop = Lock(), Event()
        self._client = self._connect()

    def fetch(
        self, objects: Sequence[S3Object], folder: Path, journal: Path, on_object: Callable[[int, int], None]
    ) -> Fetched:
        """Make `folder` hold the objects of the listing and nothing else. What is there and right is kept; `journal`
        remembers of an object whose ETag is no MD5 which bytes it was. `on_object` hears (done, total)."""
        known = _read_journal(journal)
        folder.mkdir(parents=True, exist_ok=True)
        _remove_others(folder, {one.path for one in objects})
        journal.parent.mkdir(parents=True, exist_ok=True)
        on_object(0, len(objects))
        torn = _is_torn(journal)
        with journal.open("a", encoding="utf-8") as notes:
            notes.write("\n" if torn else "")

            def bring(one: S3Object) -> None:
                if self._stop.is_set():
                    return
                md5, here = self._bring(one, folder / one.path, known.get(one.path))
                with self._lock:
                    if known.get(one.path) != (one.etag, md5):
                        notes.write(json.dumps({"path": one.path, "etag": one.etag, "md5": md5}) + "\n")
                        notes.flush()
                    self.fetched.here_already += here
                    self.fetched.objects += 1
                    self.fetched.bytes += one.size
                    on_object(self.fetched.objects, len(objects))

            for start in range(0, len(objects), AT_ONCE):
                self._side_by_side(bring, objects[start : start + AT_ONCE])
        return self.fetched

    def _side_by_side(self, bring: Callable[[S3Object], None], objects: Sequence[S3Object]) -> None:
        """After a failure, or Ctrl-C, what has not begun does not begin."""
        with ThreadPoolExecutor(self.settings.connections) as pool:
            tasks = [pool.submit(bring, one) for one in objects]
            try:
                done, waiting = wait(tasks, return_when=FIRST_EXCEPTION)
                if waiting:
                    self._stop.set()
                for task in done:
                    task.result()
            except BaseException:
                self._stop.set()
                raise

    def listing(self) -> list[S3Object]:
        """Every object below the prefix, by key. A failed page is asked for again from the last key seen."""
        found: dict[str, S3Object] = {}
        after = ""
        while True:
            page = self._patiently(lambda: self._page(after), f"the listing of {self.url}")  # noqa: B023
            for entry in page.get("Contents", []):
                after = entry["Key"]
                if path := self._path(after):
                    found[path] = S3Object(after, path, int(entry["Size"]), entry["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                break
        self._check_names(found)
        return list(found.values())

    def _page(self, after: str) -> dict[str, Any]:
        pages = self._client.get_paginator("list_objects_v2")
        asked = pages.paginate(
            Bucket=self.bucket, Prefix=self.prefix, StartAfter=after, PaginationConfig={"PageSize": PAGE}
        )
        page: dict[str, Any] = next(iter(asked))
        if page.get("IsTruncated") and not page.get("Contents"):
            raise DamagedError("a page of the listing without keys, and more to come")
        return page

    def _path(self, key: str) -> str | None:
        """The file that a key becomes; None for the mark of a folder, and for what cannot be one."""
        below = key.removeprefix(self.prefix)
        if not below or below.endswith("/"):
            return None
        parts = below.split("/")
        if any(part in ("", ".", "..") or "\0" in part or len(part.encode()) > 240 for part in parts):
            self.fetched.not_files.append(key)
            return None
        return below

    def _check_names(self, found: dict[str, S3Object]) -> None:
        if not found:
            raise WTFlowError(f"{self.url}: no object there. Look at the prefix; it has to end at a folder's name.")
        for path in found:
            for parent in PurePosixPath(path).parents:
                if parent.as_posix() in found:
                    raise WTFlowError(
                        f"{self.url}: {parent.as_posix()!r} is an object, and a folder of {path!r}. A disk cannot hold "
                        "both: rename one of them."
                    )

    def _bring(self, one: S3Object, path: Path, noted: tuple[str, str] | None) -> tuple[str, bool]:
        """The MD5 of the object's bytes, now at `path`, and whether they were there."""
        if path.is_file() and path.stat().st_size == one.size:
            md5 = _md5_of(path)
            if md5 == one.etag or noted == (one.etag, md5):
                return md5, True
        return self._patiently(lambda: self._download(one, path), f"{self.url}: {one.key!r}"), False

    def _download(self, one: S3Object, path: Path) -> str:
        """The MD5 of the object's bytes, now at `path`. If nothing explains its ETag the object is asked for once more,
        which is no failed attempt: the same bytes twice are believed."""
        with replacing(path) as draft:
            md5, explained = self._copy_of(one, draft)
            if not explained and one.key not in self._unexplained:
                self._unexplained[one.key] = md5
                md5, explained = self._copy_of(one, draft)
            before = self._unexplained.get(one.key, md5)
            if not explained:
                self._unexplained[one.key] = md5
                if before != md5:
                    raise DamagedError("its ETag says neither yes nor no, and these are other bytes than a moment ago")
                with self._lock:
                    self.fetched.by_size_alone += 1
            elif before != md5:
                with self._lock:
                    self.fetched.repeated["wrong bytes"] += 1
        return md5

    def _copy_of(self, one: S3Object, draft: Path) -> tuple[str, bool]:
        """The MD5 of the bytes that were written to `draft`, and whether as much is known of them as can be."""
        answer = self._client.get_object(
            Bucket=self.bucket, Key=one.key, IfMatch=f'"{one.etag}"', ChecksumMode="ENABLED"
        )
        digest, size = hashlib.md5(usedforsecurity=False), 0
        with draft.open("wb") as file:
            for chunk in answer["Body"].iter_chunks(CHUNK):
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        if size != one.size:
            raise DamagedError(f"{size} bytes in place of {one.size}")
        return digest.hexdigest(), self._check(one, draft, digest.hexdigest(), answer)

    def _check(self, one: S3Object, draft: Path, md5: str, answer: dict[str, Any]) -> bool:
        """Compare with what the server says of the object. False: its ETag says neither yes nor no."""
        encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
        if MD5.fullmatch(one.etag) and not encrypted:
            if md5 != one.etag:
                raise DamagedError("other bytes than its ETag says")
        elif PARTS.fullmatch(one.etag) and not encrypted:
            return self._check_parts(one, draft)
        elif not isinstance(answer["Body"], StreamingChecksumBody):  # which has compared a checksum
            with self._lock:
                self.fetched.by_size_alone += 1
        return True

    def _check_parts(self, one: S3Object, draft: Path) -> bool:
        """Of an object that was uploaded in parts, whose ETag is made of their MD5s. False where neither the usual
        sizes nor the server tell which parts."""
        if any(_md5_of_parts(draft, parts) == one.etag for parts in _usual_parts(one)):
            return True
        told = [] if one.key in self._unexplained else self._parts(one)
        if told and _md5_of_parts(draft, told) != one.etag:
            raise DamagedError("other bytes than the ETag of its parts says")
        return bool(told)

    def _parts(self, one: S3Object) -> list[int]:
        """Sizes of the parts, as the server says them; none if it does not tell."""

        def size_of(number: int) -> int:
            head = self._client.head_object(Bucket=self.bucket, Key=one.key, PartNumber=number)
            return int(head["ContentLength"])

        what = f"{self.url}: the parts of {one.key!r}"
        try:
            sizes = [self._patiently(partial(size_of, number), what) for number in range(1, _parts_of(one) + 1)]
        except WTFlowError:  # a second download shows whether the server refuses this question alone
            return []
        return sizes if sum(sizes) == one.size else []

    def _patiently(self, ask: Callable[[], T], what: str) -> T:
        """`ask`, again and again while it fails for a passing reason."""
        for attempt in range(1, self.settings.attempts + 1):
            try:
                return ask()
            except (boto.ClientError, boto.BotoCoreError, *PASSING) as error:
                reason = _passing(error)
                if reason is None:
                    raise self._final(error, what) from error
                if attempt == self.settings.attempts or self._stop.is_set():
                    raise WTFlowError(
                        f"{what}: {attempt} attempts failed, the last one with: {error}. What is here already is kept: "
                        "type the same command again when the server answers."
                    ) from error
                with self._lock:
                    self.fetched.repeated[reason] += 1
                pause = min(20.0, self.settings.pause * 2 ** (attempt - 1))
                self._stop.wait(pause * random.uniform(0.5, 1.5))
        raise AssertionError("attempts is above 0")

    def _final(self, error: Exception, what: str) -> WTFlowError:
        if isinstance(error, boto.NoCredentialsError):
            return WTFlowError(f"{what}: no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")
        answer = error.response if isinstance(error, boto.ClientError) else {}
        code, status = answer.get("Error", {}).get("Code"), _status(answer)
        kept = "then type the same command again: what is here already is kept."
        if code in ("PreconditionFailed", "NoSuchKey", "412", "404"):
            remedy = "It changed after it was listed: type the same command again."
        elif code == "NoSuchBucket":
            remedy = "Look at the name of the bucket, and at AWS_ENDPOINT_URL."
        elif answer and status not in (401, 403) and code not in EXPIRED:
            remedy = (
                f"Look up {code} (status {status}) in the server's manual, and look at AWS_ENDPOINT_URL and AWS_REGION;"
            )
            remedy += f" {kept}"
        else:
            remedy = "Look at AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN (has it expired?) and at"
            remedy += f" AWS_ENDPOINT_URL; {kept}"
        return WTFlowError(f"{what}: {error}. {remedy}")

    def _connect(self) -> Any:
        config = Config(
            retries={"total_max_attempts": 1},
            connect_timeout=self.settings.timeout,
            read_timeout=self.settings.timeout,
            max_pool_connections=self.settings.connections,
        )
        try:
            return boto3.session.Session().client("s3", config=config)
        except (boto.BotoCoreError, ValueError) as error:
            raise WTFlowError(f"{self.url}: {error}. Look at AWS_REGION, AWS_PROFILE and AWS_ENDPOINT_URL.") from None


def _passing(error: Exception) -> str | None:
    """What to call a failure that may pass by itself; None for one that will not."""
    if isinstance(error, boto.ClientError):
        status = _status(error.response)
        passing = (status >= 500 and status != 501) or status in (408, 425, 429)
        passing = passing or error.response.get("Error", {}).get("Code") in ("RequestTimeout", "SlowDown", "Throttling")
        return f"status {status}" if passing else None
    if isinstance(error, DamagedError | boto.FlexibleChecksumError):
        return "wrong bytes"
    if not isinstance(error, PASSING):
        return None
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__.removesuffix("Error")).lower()


def _status(answer: Mapping[str, Any]) -> int:
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _parts_of(one: S3Object) -> int:
    """How many parts the ETag says."""
    count = PARTS.fullmatch(one.etag)
    return int(count[1]) if count else 0


def _usual_parts(one: S3Object) -> list[list[int]]:
    """The ways to cut the object into its number of parts that are all of a usual size, but for the last."""
    count = _parts_of(one)
    lasts = [(size, one.size - (count - 1) * size) for size in USUAL_PARTS]
    return [[size] * (count - 1) + [last] for size, last in lasts if 0 < last <= size]


def _md5_of_parts(path: Path, sizes: Sequence[int]) -> str:
    """The ETag of an object that was uploaded in parts of these sizes: the MD5 of their MD5s, and their number."""
    with path.open("rb") as file:
        digests = [hashlib.md5(file.read(size), usedforsecurity=False).digest() for size in sizes]
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def _read_journal(journal: Path) -> dict[str, tuple[str, str]]:
    """ETag and MD5 of what earlier runs brought, by path. The line that a kill tore is skipped."""
    known = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
        try:
            note = json.loads(line)
            known[str(note["path"])] = (str(note["etag"]), str(note["md5"]))
        except (ValueError, KeyError, TypeError):
            continue
    return known


def _is_torn(journal: Path) -> bool:
    """Whether a kill left its last line without an end, to which the next one would be glued."""
    notes = journal.read_bytes() if journal.exists() else b""
    return bool(notes) and not notes.endswith(b"\n")


def _remove_others(folder: Path, wanted: set[str]) -> None:
    """Files of objects that are gone, drafts of a killed run, folders in place of files."""
    parents = {parent.as_posix() for path in wanted for parent in PurePosixPath(path).parents}
    for path in sorted(folder.rglob("*"), reverse=True):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            if name not in parents:
                shutil.rmtree(path)
        elif name not in wanted:
            path.unlink()
