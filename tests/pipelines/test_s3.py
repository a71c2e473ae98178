"""Against an S3 server over HTTP, with a proxy between that fails as networks and servers do."""

import errno
import random
import shutil
import zlib
from base64 import b64encode
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from urllib3 import HTTPResponse

from pipelines import fetch
from pipelines.adapters import s3 as s3_adapter
from pipelines.adapters.s3 import Bucket, Fetched, S3Object, S3Settings
from tests.data import data_sets
from tests.data.raw_folders import encoded, noise, params
from tests.pipelines.faulty_proxy import Fault, Proxy
from tests.s3_server import REAL
from wtflow.data.prepare import prepare
from wtflow.errors import WTFlowError

QUICK = S3Settings(connections=4, timeout=60.0, attempts=8, pause=0.01)
LINE = "{prepare: {}, extract: {}, train: {}, evaluate: {}, register: {}}"


def filled(bucket: Any, count: int = 20, prefix: str = "line/") -> dict[str, bytes]:
    """Puts objects, and says what the folder has to hold."""
    names = [f"good/teil {number:03d} größe.png" for number in range(count)]
    content = {name: encoded(noise(number)) for number, name in enumerate(names)}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda item: bucket.put_object(Key=prefix + item[0], Body=item[1]), content.items()))
    return content


def held(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def once(fault: str, *names: str) -> Fault:
    """This fault, the first time that a path with each of these names is asked for."""
    left = set(names)

    def choose(method: str, path: str) -> str | None:
        hit = {name for name in left if name in path}
        left.difference_update(hit)
        return fault if hit else None

    return choose


def fetched(bucket: Any, folder: Path, prefix: str = "line/", settings: S3Settings = QUICK) -> Fetched:
    source = Bucket(f"s3://{bucket.name}/{prefix}", settings)
    return source.fetch(source.listing(), folder, folder.with_suffix(".jsonl"), lambda done, total: None)


def test_what_is_below_the_prefix_becomes_a_folder(bucket: Any, tmp_path: Path) -> None:
    content = filled(bucket) | {"empty.txt": b""}
    bucket.put_object(Key="line/empty.txt", Body=b"")
    bucket.put_object(Key="line/good/", Body=b"")  # the mark of a folder
    bucket.put_object(Key="line2/other.png", Body=b"of another line")
    heard: list[tuple[int, int]] = []
    source = Bucket(f"s3://{bucket.name}/line", QUICK)
    result = source.fetch(source.listing(), tmp_path / "raw", tmp_path / "notes", lambda *counts: heard.append(counts))
    assert held(tmp_path / "raw") == content
    assert heard == [(done, 21) for done in range(22)]
    assert (result.objects, result.bytes) == (21, sum(map(len, content.values())))
    assert (result.here_already, result.by_size_alone, result.not_files) == (0, 0, [])
    assert result.repeated.total() == 0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "status 500"),
        ("503", "status 503"),
        ("cut", None),
        ("long", None),
        ("short", "wrong bytes"),
        ("flip", "wrong bytes"),
    ],
)
def test_a_passing_fault_is_repeated_counted_and_leaves_no_wrong_byte(
    s3: Proxy, bucket: Any, tmp_path: Path, fault: str, reason: str | None
) -> None:
    content = filled(bucket, 6)
    s3.fault = once(fault, "003", "005")
    result = fetched(bucket, tmp_path / "raw")
    assert held(tmp_path / "raw") == content
    assert s3.done[fault] == result.repeated.total() == 2
    if reason:
        assert result.repeated == {reason: 2}


def test_a_body_that_comes_to_a_halt_is_asked_for_again(s3: Proxy, bucket: Any, tmp_path: Path) -> None:
    content = filled(bucket, 6)
    s3.fault = once("slow", "003", "005")
    result = fetched(bucket, tmp_path / "raw", settings=QUICK.model_copy(update={"timeout": 1.0, "attempts": 50}))
    assert held(tmp_path / "raw") == content
    assert result.repeated["read timeout"] >= 2


@pytest.mark.parametrize("fault", ["500", "cut", "garbage"])
def test_the_listing_is_repeated_too_and_goes_on_page_by_page(
    s3: Proxy, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    content = filled(bucket, 12)
    monkeypatch.setattr(s3_adapter, "PAGE", 5)
    turn = iter([fault, None, fault])
    s3.fault = lambda method, path: next(turn, None) if "list-type=2" in path else None
    result = fetched(bucket, tmp_path / "raw")
    assert held(tmp_path / "raw") == content
    assert result.repeated.total() == 2
    assert s3.asked["GET"] == 12 + 3 + 2  # objects, pages, repetitions


def test_with_a_fifth_of_the_requests_failing_the_result_is_the_same(s3: Proxy, bucket: Any, tmp_path: Path) -> None:
    content = filled(bucket, 150)
    dice = random.Random(5)
    faults = ("500", "503", "cut", "short", "long", "flip")
    s3.fault = lambda method, path: (
        dice.choice(faults if "list-type" not in path else faults[:3]) if dice.random() < 0.2 else None
    )
    result = fetched(bucket, tmp_path / "raw", settings=QUICK.model_copy(update={"attempts": 20}))
    assert held(tmp_path / "raw") == content
    failed = sum(count for fault, count in s3.done.items() if fault)
    assert result.repeated.total() == failed > 20
    assert f"{failed} requests repeated (" in fetch.said("line", "s3://b", result)


def test_a_server_that_never_recovers_ends_with_what_failed(s3: Proxy, bucket: Any, tmp_path: Path) -> None:
    content = filled(bucket, 5)
    s3.fault = lambda method, path: "503" if "003" in path else None
    with pytest.raises(WTFlowError, match=r"teil 003 größe\.png': 8 attempts failed.*SlowDown.*same command again"):
        fetched(bucket, tmp_path / "raw")
    assert held(tmp_path / "raw").items() <= content.items()


def test_expired_credentials_end_at_once_and_a_renewal_goes_on(s3: Proxy, bucket: Any, tmp_path: Path) -> None:
    content = filled(bucket, 30)
    s3.fault = lambda method, path: "expired" if s3.asked["GET"] > 12 else None
    with pytest.raises(WTFlowError, match=r"ExpiredToken.*AWS_SESSION_TOKEN \(has it expired\?\)"):
        fetched(bucket, tmp_path / "raw")
    assert s3.asked["GET"] < 25  # nobody asked again and again
    s3.fault = lambda method, path: None
    assert fetched(bucket, tmp_path / "raw").here_already >= 8
    assert held(tmp_path / "raw") == content


def test_another_refusal_is_named_and_not_taken_for_one_of_credentials(s3: Proxy, bucket: Any, tmp_path: Path) -> None:
    filled(bucket, 1)
    for fault, message in (("400", r"InvalidArgument \(status 400\)"), ("501", r"NotImplemented \(status 501\)")):
        s3.fault = lambda method, path: fault  # noqa: B023
        with pytest.raises(WTFlowError, match=message) as caught:
            fetched(bucket, tmp_path / "raw")
        assert "AWS_SECRET_ACCESS_KEY" not in str(caught.value)
    assert s3.asked["GET"] == 2
    s3.fault = lambda method, path: "403"
    with pytest.raises(WTFlowError, match=r"AccessDenied.*AWS_SECRET_ACCESS_KEY"):
        fetched(bucket, tmp_path / "raw")


@pytest.mark.parametrize(
    ("name", "value", "checked"),
    [
        ("crc32", "{crc32}", True),
        ("crc32", "{crc32}-3", False),  # made of the checksums of parts
        ("crc64nvme", "AAAAAAAAAAA=", False),  # botocore needs awscrt for it
    ],
)
def test_only_a_checksum_that_was_compared_counts(
    s3: Proxy, tmp_path: Path, name: str, value: str, checked: bool
) -> None:
    sent, etag = b"other bytes", "0123456789abcdef0123456789abcdef"
    crc32 = b64encode(zlib.crc32(b"right bytes").to_bytes(4, "big")).decode()
    headers = {
        "content-length": str(len(sent)),
        "x-amz-server-side-encryption": "aws:kms",
        f"x-amz-checksum-{name}": value.format(crc32=crc32),
    }

    def answer(request: Any, **_: object) -> AWSResponse:
        return AWSResponse(request.url, 200, headers, HTTPResponse(BytesIO(sent), headers, preload_content=False))

    source = Bucket("s3://bucket/line", QUICK.model_copy(update={"attempts": 1}))
    source._client.meta.events.register("before-send.s3.GetObject", answer)
    objects = [S3Object("line/a.bin", "a.bin", len(sent), etag)]
    if checked:
        with pytest.raises(WTFlowError, match=f"Expected checksum {crc32} did not match"):
            source.fetch(objects, tmp_path / "raw", tmp_path / "notes", lambda done, total: None)
    else:
        result = source.fetch(objects, tmp_path / "raw", tmp_path / "notes", lambda done, total: None)
        assert result.by_size_alone == 1


def test_what_is_here_is_not_downloaded_again_and_what_changed_is(s3: Proxy, bucket: Any, tmp_path: Path) -> None:
    content, raw = filled(bucket, 10), tmp_path / "raw"
    fetched(bucket, raw)
    before = s3.asked["GET"]
    assert fetched(bucket, raw).here_already == 10
    assert s3.asked["GET"] == before + 1  # the listing
    names = sorted(content)
    bucket.Object(f"line/{names[0]}").delete()
    bucket.put_object(Key=f"line/{names[1]}", Body=b"new")
    bucket.put_object(Key="line/more/11.png", Body=b"eleven")
    (raw / names[2]).write_bytes(content[names[2]][:-1] + b"?")  # of the right size, damaged here
    (raw / names[3]).write_bytes(b"cut")
    (raw / f"{names[4]}.tmp-0123").write_bytes(b"of a killed run")
    (raw / "more").write_bytes(b"a file where a folder belongs")
    assert fetched(bucket, raw).here_already == 6
    del content[names[0]]
    assert held(raw) == content | {names[1]: b"new", "more/11.png": b"eleven"}


def upload_in_parts(bucket: Any, key: str, *parts: bytes) -> None:
    upload = bucket.Object(key).initiate_multipart_upload()
    answers = [upload.Part(number).upload(Body=data) for number, data in enumerate(parts, start=1)]
    done = [{"PartNumber": number, "ETag": answer["ETag"]} for number, answer in enumerate(answers, start=1)]
    upload.complete(MultipartUpload={"Parts": done})


def telling(fault: str) -> Fault:
    """This fault in the first download, from a server that tells the parts."""
    turn = iter([fault])
    return lambda method, path: next(turn, None) if "large" in path and method == "GET" else None


def silent(fault: str) -> Fault:
    """The same from a server that does not know what a part is, as some are."""
    tell = telling(fault)
    return lambda method, path: "whole" if "partNumber" in path and not REAL else tell(method, path)


@pytest.mark.parametrize("server", [telling, silent])
@pytest.mark.parametrize(
    ("sizes", "usual"), [((5 << 20, 5 << 20, 100_000), True), ((5 << 20, 5_657_120, 100_000), False)]
)
def test_an_object_of_several_parts_is_checked_and_remembered(
    s3: Proxy, bucket: Any, tmp_path: Path, server: Callable[[str], Fault], sizes: Sequence[int], usual: bool
) -> None:
    dice = random.Random(0)
    parts = [dice.randbytes(size) for size in sizes]
    upload_in_parts(bucket, "line/large.bin", *parts)
    s3.fault = server("flip")
    first = boto3.client("s3").head_object(Bucket=bucket.name, Key="line/large.bin", PartNumber=1)
    told = first["ContentLength"] == sizes[0]
    result = fetched(bucket, tmp_path / "raw")
    assert held(tmp_path / "raw") == {"large.bin": b"".join(parts)}
    assert REAL or told == (server is telling)
    if usual or told:
        assert (result.repeated["wrong bytes"], result.by_size_alone) == (1, 0)
    else:  # the second download differs, the third is as the second
        assert (result.repeated["wrong bytes"], result.by_size_alone) == (1, 1)
    assert fetched(bucket, tmp_path / "raw").here_already == 1
    tmp_path.joinpath("raw.jsonl").write_text('{"path": "large.b')  # torn by a kill
    assert [fetched(bucket, tmp_path / "raw").here_already for _ in range(2)] == [0, 1]


def two_parts(bucket: Any, size: int) -> bytes:
    """The content of line/large.bin, of which the first part has this size."""
    dice = random.Random(1)
    parts = [dice.randbytes(size), dice.randbytes(100_000)]
    upload_in_parts(bucket, "line/large.bin", *parts)
    return b"".join(parts)


def downloads(s3: Proxy) -> int:
    """How often objects were asked for, of runs that listed once each."""
    return s3.asked["GET"] - 1


@pytest.mark.parametrize("fault", ["400", "403", "501", "503"])
def test_a_server_that_refuses_to_tell_parts_is_asked_for_a_second_copy(
    s3: Proxy, bucket: Any, tmp_path: Path, fault: str
) -> None:
    content = two_parts(bucket, 5_300_000)
    s3.fault = lambda method, path: fault if "partNumber" in path else None
    result = fetched(bucket, tmp_path / "raw", settings=QUICK.model_copy(update={"attempts": 1}))
    assert held(tmp_path / "raw") == {"large.bin": content}
    assert (downloads(s3), result.by_size_alone, result.repeated.total()) == (2, 1, 0)


def test_parts_of_a_usual_size_are_not_asked_for(s3: Proxy, bucket: Any, tmp_path: Path) -> None:
    two_parts(bucket, 5 << 20)
    assert fetched(bucket, tmp_path / "raw").by_size_alone == 0
    assert (downloads(s3), s3.asked["HEAD"]) == (1, 0)


def test_a_question_for_parts_that_fails_in_passing_costs_no_download(s3: Proxy, bucket: Any, tmp_path: Path) -> None:
    two_parts(bucket, 5_300_000)
    s3.fault = once("503", "partNumber=2")
    result = fetched(bucket, tmp_path / "raw")
    assert result.repeated == {"status 503": 1}
    assert REAL or (downloads(s3), s3.asked["HEAD"], result.by_size_alone) == (1, 3, 0)


def test_keys_that_are_no_file_names_are_left_out_and_named(bucket: Any, tmp_path: Path) -> None:
    content = filled(bucket, 2)
    for key in ("line/a//b.png", f"line/{'x' * 300}.png"):
        bucket.put_object(Key=key, Body=b"x")
    result = fetched(bucket, tmp_path / "raw")
    assert held(tmp_path / "raw") == content
    assert len(result.not_files) == 2
    assert "2 keys left out that cannot be file names, first 'line/a//b.png'" in fetch.said("line", "s3://b", result)


@pytest.mark.parametrize("key", ["line/../../up.png", "line/./a.png", "line//etc/x", "line/a\0b"])
def test_no_key_leads_out_of_the_folder(s3: Proxy, key: str) -> None:
    one = Bucket("s3://bucket/line", QUICK)
    assert one._path(key) is None
    assert one.fetched.not_files == [key]


def test_a_name_that_is_file_and_folder_is_refused(bucket: Any, tmp_path: Path) -> None:
    for key in ("line/a", "line/a/b.png"):
        bucket.put_object(Key=key, Body=b"x")
    with pytest.raises(WTFlowError, match=r"'a' is an object, and a folder of 'a/b\.png'"):
        fetched(bucket, tmp_path / "raw")


def test_what_cannot_be_read_says_what_to_look_at(
    s3: Proxy, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in ("http://bucket/x", "s3:/bucket", "s3://", "bucket"):
        with pytest.raises(WTFlowError, match="not the address of a bucket"):
            Bucket(url, QUICK)
    with pytest.raises(WTFlowError, match="no object there"):
        fetched(bucket, tmp_path / "raw", "nothing")
    with pytest.raises(WTFlowError, match=r"NoSuchBucket.*name of the bucket"):
        Bucket("s3://no-such-bucket", QUICK).listing()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(WTFlowError, match=r"2 attempts failed.*127\.0\.0\.1:9"):
        Bucket("s3://bucket", QUICK.model_copy(update={"attempts": 2})).listing()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(WTFlowError, match=r"no credentials\. Set AWS_ACCESS_KEY_ID"):
        Bucket("s3://bucket", QUICK).listing()


def project(root: Path, url: str) -> None:
    root.mkdir(exist_ok=True)
    (root / "params.yaml").write_text(f"fetch:\n  bottles: {{url: '{url}'}}\nlines:\n  bottles: {LINE}\n")


def test_a_bucket_stands_before_any_layout(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data_sets.mvtec_loco(tmp_path / "source", 0, 20)
    for name, data in held(tmp_path / "source").items():
        bucket.put_object(Key=f"loco/{name}", Body=data)
    project(tmp_path / "project", f"s3://{bucket.name}/loco")
    monkeypatch.chdir(tmp_path / "project")
    fetch.main("bottles")
    settings = params(layout="mvtec_loco", max_rejected_fraction=0.0)
    here = prepare(Path("data/raw/bottles"), "bottles", settings)
    assert here.manifest.digest == prepare(tmp_path / "source", "bottles", settings).manifest.digest
    bucket.put_object(Key="loco/train/good/900.png", Body=encoded(noise(900)))
    fetch.main("bottles")
    assert "0 of them were here" in (shown := capsys.readouterr().out)
    assert f"{len(held(tmp_path / 'source'))} of them were here; 0 requests repeated" in shown
    assert Path("data/raw/bottles/train/good/900.png").is_file()
    assert not Path(".wtflow/fetch/bottles").exists()


@pytest.fixture
def bottles(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What a bucket holds for the line of a project, which is the working folder."""
    content = filled(bucket, 5)
    project(tmp_path / "project", f"s3://{bucket.name}/line")
    monkeypatch.chdir(tmp_path / "project")
    return content


RAW, WORK = Path("data/raw/bottles"), Path(".wtflow/fetch/bottles")


def refusing(monkeypatch: pytest.MonkeyPatch, number: int, source: Path, target: Path | None = None) -> None:
    """Renaming `source`, to `target` if it matters, fails."""
    rename = Path.rename

    def refused(self: Path, other: Path) -> Path:
        if self == source and target in (None, other):
            raise OSError(number, "refused")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", refused)


def full_disk(source: Path, target: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(target))


def test_a_download_that_cannot_take_its_place_waits_in_the_work_folder(
    bottles: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RAW.mkdir(parents=True)
    with monkeypatch.context() as patched:
        refusing(patched, errno.EBUSY, RAW)  # as a mount point does
        with pytest.raises(WTFlowError, match=r"bottles: cannot be replaced \(refused\)\. .* kept in \.wtflow/fetch"):
            fetch.main("bottles")
    assert (held(WORK), held(RAW)) == (bottles, {})
    fetch.main("bottles")
    assert "5 of them were here" in capsys.readouterr().out
    assert held(RAW) == bottles


def test_from_another_disk_the_download_is_copied(bottles: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    (RAW / "old").mkdir(parents=True)
    refusing(monkeypatch, errno.EXDEV, WORK, RAW)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full_disk)
        with pytest.raises(OSError, match="No space left") as caught:
            fetch.main("bottles")
    assert caught.value.errno == errno.ENOSPC
    assert held(WORK) == bottles
    assert [path.name for path in RAW.parent.iterdir()] == ["bottles"]
    assert (RAW / "old").is_dir()
    fetch.main("bottles")
    assert held(RAW) == bottles
    assert not WORK.exists()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_place_that_is_no_folder_is_refused_before_anything_is_asked_for(
    s3: Proxy, bottles: dict[str, bytes], kind: str
) -> None:
    RAW.parent.mkdir(parents=True)
    RAW.symlink_to("/nowhere/bottles") if kind == "link" else RAW.touch()
    with pytest.raises(WTFlowError, match=r"data/raw/bottles: has to be a folder, or absent"):
        fetch.main("bottles")
    assert not s3.asked
    assert not WORK.exists()


def test_what_is_here_is_copied_once_the_bucket_has_answered(
    s3: Proxy, bottles: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch.main("bottles")
    s3.fault = lambda method, path: "403"
    with pytest.raises(WTFlowError, match="AccessDenied"):
        fetch.main("bottles")
    assert not WORK.exists()
    s3.fault = lambda method, path: None
    (RAW / "broken.png").symlink_to("nowhere")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full_disk)
        with pytest.raises(OSError, match="No space left") as caught:
            fetch.main("bottles")
    assert caught.value.errno == errno.ENOSPC  # which `pipelines.stage.run` explains
    shutil.rmtree(WORK)
    capsys.readouterr()
    fetch.main("bottles")
    assert "5 of them were here" in capsys.readouterr().out
    assert held(RAW) == bottles
