"""Which web pages may call: own names and configured origins, no rebound name, no page of another site."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.web_policy import WebPolicy

LOCAL = WebPolicy.of_listener("127.0.0.1", ("box",), ("https://chat.example",))
OPEN = WebPolicy.of_listener("0.0.0.0", ("box",), ())


@pytest.mark.parametrize(
    ("policy", "headers"),
    [
        (LOCAL, {"Host": "localhost:8080"}),
        (LOCAL, {"Host": "127.0.0.1:8080"}),
        (LOCAL, {"Host": "[::1]:8080"}),
        (LOCAL, {"Host": "BOX:8080"}),
        (LOCAL, {"Host": "localhost:8080", "Origin": "http://localhost:8080"}),
        (LOCAL, {"Host": "localhost:8080", "Origin": "https://chat.example"}),
        (LOCAL, {"Host": "localhost:8080", "Sec-Fetch-Site": "none"}),
        (OPEN, {"Host": "repertory.models.svc:8080"}),
        (OPEN, {"Host": "10.0.0.7:8080", "Origin": "http://10.0.0.7:8080"}),
        (WebPolicy.of_listener("127.0.0.1", ("*",), ()), {"Host": "anything"}),
    ],
)
def test_refusal_is_empty_for_programs_and_allowed_pages(policy: WebPolicy, headers: dict[str, str]) -> None:
    assert policy.refusal("POST", headers) == ""


@pytest.mark.parametrize(
    ("policy", "headers"),
    [
        (LOCAL, {"Host": "evil.example:8080"}),
        (LOCAL, {}),
        (LOCAL, {"Host": "localhost.evil.example"}),
        (LOCAL, {"Host": "evil.example:8080", "Origin": "http://evil.example:8080"}),
        (LOCAL, {"Host": "localhost:8080", "Origin": "http://evil.example"}),
        (LOCAL, {"Host": "localhost:8080", "Origin": "http://localhost:3000"}),
        (LOCAL, {"Host": "localhost:8080", "Origin": "null"}),
        (LOCAL, {"Host": "localhost:8080", "Origin": ""}),
        (LOCAL, {"Host": "localhost:8080", "Sec-Fetch-Site": "cross-site"}),
        (LOCAL, {"Host": "[::1", "Origin": "http://[::1"}),
        (OPEN, {"Host": "evil.example:8080", "Origin": "http://evil.example:8080"}),
        (OPEN, {"Host": "10.0.0.7:8080", "Origin": "http://evil.example"}),
    ],
)
def test_refusal_names_foreign_hosts_and_origins(policy: WebPolicy, headers: dict[str, str]) -> None:
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "INVENTED"):
        assert policy.refusal(method, headers)
    assert policy.refusal("OPTIONS", headers) == ""


@given(st.text(), st.text(), st.sampled_from(["GET", "POST", "OPTIONS"]))
def test_policy_takes_any_header(host: str, origin: str, method: str) -> None:
    headers = {"Host": host, "Origin": origin, "Access-Control-Request-Method": "POST"}
    if LOCAL.response_headers(origin):
        assert origin.rstrip("/").lower() == "https://chat.example"
    LOCAL.refusal(method, headers)
    LOCAL.preflight_headers(method, headers)
