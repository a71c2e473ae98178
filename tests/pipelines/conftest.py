"""A bucket, and a proxy before it that fails when a test wants it to."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.pipelines.faulty_proxy import Proxy, proxy
from tests.s3_server import CREDENTIALS, FOREIGN, fresh_bucket


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy, which AWS_ENDPOINT_URL names."""
    with proxy(s3_port) as between:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": between.url}.items():
            monkeypatch.setenv(name, value)
        for name in FOREIGN:
            monkeypatch.delenv(name, raising=False)
        yield between


@pytest.fixture
def bucket(s3: Proxy, s3_port: int) -> Iterator[Any]:
    """An empty bucket of this test's own, to put objects into, past the proxy."""
    with fresh_bucket(s3_port) as made:
        yield made
