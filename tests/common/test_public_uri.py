"""URIs as callers see them."""

import pytest

from common.public_uri import public_uri


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("/models/llama 8b?", "/models/llama 8b?"),
        ("file:///models/a", "file:///models/a"),
        ("hf://meta-llama/Llama-3.1-8B@main", "hf://meta-llama/Llama-3.1-8B@main"),
        ("s3://bucket/adapters/sql", "s3://bucket/adapters/sql"),
        ("https://me:secret@host:8443/m?X-Amz-Signature=secret#secret", "https://host:8443/m"),
        ("https://[broken", ""),
    ],
)
def test_public_uri_leaves_secrets_out(uri: str, shown: str) -> None:
    assert public_uri(uri) == shown
