"""The S3 server of the tests: the one of WTFLOW_TEST_S3 (`make s3` starts a real one), else moto's in this process."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import boto3
from moto.server import ThreadedMotoServer

REAL = os.environ.get("WTFLOW_TEST_S3")
"""http://host:port of a real server whose user `test` has the secret `test`; None for moto."""
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
FOREIGN = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3")
"""What the developer's own environment may hold, and would turn the tests elsewhere."""


@contextmanager
def s3_server() -> Iterator[int]:
    """A running server's port on this machine."""
    if REAL:
        address = urlsplit(REAL)
        assert address.hostname == "127.0.0.1", "WTFLOW_TEST_S3: the tests' proxy forwards to http://127.0.0.1:PORT"
        assert address.port
        yield address.port
        return
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        yield moto.get_host_and_port()[1]
    finally:
        moto.stop()


def environment(url: str) -> dict[str, str]:
    """What a process needs to reach a server that is not AWS."""
    return {
        **CREDENTIALS,
        "AWS_ENDPOINT_URL": url,
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }


@contextmanager
def fresh_bucket(port: int) -> Iterator[Any]:
    """An empty bucket of the caller's own; gone afterwards, with what is in it."""
    credentials = {f"aws_{name}": "test" for name in ("access_key_id", "secret_access_key")}
    s3 = boto3.resource("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1", **credentials)
    bucket = s3.Bucket(f"wtflow-{uuid.uuid4().hex[:12]}")
    bucket.create()
    try:
        yield bucket
    finally:
        bucket.objects.all().delete()
        bucket.delete()
