"""Buckets of 16 rows instead of 256, so that short generations pass through several."""

from collections.abc import Iterator

import pytest

from fledge.decoding import generate as module
from fledge.decoding import session


@pytest.fixture
def small_buckets(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(session, "BUCKET", 16)
    yield
    module._sessions.clear()  # sessions of small buckets, some of them with planted faults
