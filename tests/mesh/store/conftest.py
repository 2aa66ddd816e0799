"""Fixtures of the stores' tests."""

import uuid

import pytest


@pytest.fixture
def root() -> str:
    """A prefix of keys that no other test has."""
    return f"/etcd-{uuid.uuid4().hex}/"
