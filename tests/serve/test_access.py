"""Who is let in: keys, names, pages of other sites, TLS, Unix sockets."""

from __future__ import annotations

import logging
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.serve.conftest import Process, serving
from tests.serve.test_refusals import message

from smolstack.errors import GenerationError
from smolstack.serve.origins import own_names
from smolstack.serve.running import OnceInAWhile
from smolstack.serve.settings import ServerSettings


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:9", 200),
        ("192.168.7.7:8000", 200),  # an address, which no page of another site has as its name
        ("LOCALHOST.", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example:8000", 421),
        ("x:y:z", 421),
    ],
)
def test_a_name_that_is_not_the_server_s_is_refused(
    server: Process, host: str, status: int
) -> None:
    response = httpx.get(f"{server.url}/v1/models", headers={"Host": host})
    assert response.status_code == status, response.text
    if status == 421:
        assert f"'{host}'" in message(response)
        assert "--allowed-hosts NAME" in message(response)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/plan", "/tokenize"])
def test_pages_of_other_sites_are_refused(server: Process, path: str) -> None:
    for origin in ("https://evil.example", "null", "http://localhost:1", "http://["):
        response = httpx.post(server.url + path, json={}, headers={"Origin": origin})
        assert response.status_code == 403
        assert repr(origin) in message(response)
        assert "access-control-allow-origin" not in response.headers
    own = httpx.post(server.url + path, json={}, headers={"Origin": server.url})
    assert own.status_code == 400


@pytest.fixture(scope="module")
def opened(tiny_folder: Path) -> Iterator[Process]:
    with serving(
        *("--model", str(tiny_folder), "--api-key", "first", "--api-key", " second "),
        *("--allow-origin", "https://a.example", "--allow-origin", "https://b.example"),
        environment={"SMOLSTACK_API_KEY": "third"},
    ) as process:
        yield process


def test_each_of_several_keys_is_good(opened: Process) -> None:
    statuses = {
        key: httpx.get(
            f"{opened.url}/v1/models", headers={"Authorization": f"Bearer {key}"}
        ).status_code
        for key in ("first", "second", "  third", "fourth", "firs", "x")
    }
    assert list(statuses.values()) == [200, 200, 200, 401, 401, 401]


def test_pages_that_were_allowed_may_ask_and_read_refusals(opened: Process) -> None:
    asking = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    preflight = httpx.options(f"{opened.url}/v1/chat/completions", headers=asking)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    refused = httpx.get(f"{opened.url}/v1/models", headers={"Origin": "https://b.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://b.example"
    other = httpx.get(f"{opened.url}/v1/models", headers={"Origin": "https://c.example"})
    assert other.status_code == 403
    # A key keeps strangers out: the name is not looked at.
    named = {"Host": "smolstack.example", "Authorization": "Bearer first"}
    assert httpx.get(f"{opened.url}/v1/models", headers=named).status_code == 200


def test_names_that_were_allowed(tiny_folder: Path) -> None:
    with serving("--model", str(tiny_folder), "--allowed-hosts", "smolstack.example") as process:
        for host, status in (("smolstack.example", 200), ("other.example", 421)):
            response = httpx.get(f"{process.url}/health", headers={"Host": host})
            assert response.status_code == status


def test_the_own_names_of_a_server_on_every_address_hold_the_machine_s() -> None:
    assert own_names("127.0.0.1") == ("127.0.0.1", "localhost")
    assert len(own_names("0.0.0.0")) >= 3


@pytest.mark.parametrize("key", ["", " ", " a", "schlüssel", "a\nb"])
def test_a_key_that_no_header_carries_is_refused(key: str) -> None:
    with pytest.raises(GenerationError, match="API key"):
        ServerSettings(api_keys=(key,))


def test_an_origin_that_is_none_is_refused() -> None:
    with pytest.raises(GenerationError, match=r"'example\.org' is not an origin"):
        ServerSettings(origins=("example.org",))


def said_by(*arguments: str, environment: dict[str, str] | None = None) -> str:
    with (
        pytest.raises(AssertionError, match="did not start") as caught,
        serving(*arguments, environment=environment),
    ):
        pass
    return str(caught.value)


def test_what_cannot_be_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    missing = ("--model", str(tmp_path / "no model"))
    keyed = {"SMOLSTACK_API_KEY": "  "}
    assert "SMOLSTACK_API_KEY is empty" in said_by(*missing, environment=keyed)
    assert "--api-key is empty" in said_by(*missing, "--api-key", "")
    assert "without --ssl-certfile" in said_by(*missing, "--ssl-keyfile", "a.pem")
    assert "a.pem is not a file" in said_by(*missing, "--ssl-certfile", str(tmp_path / "a.pem"))
    (tmp_path / "a.pem").write_text("no certificate")
    assert "cannot be used" in said_by(*missing, "--ssl-certfile", str(tmp_path / "a.pem"))
    twice = said_by(*missing, "--model", "other")
    assert "'--model'" in twice
    assert "given 2 times, expected once" in twice
    uds = said_by(*missing, "--uds", str(tmp_path / "gone" / "socket"))
    assert "cannot listen on" in uds


def test_tls(tiny_folder: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", str(key)),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-out", str(cert)),
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("there is no openssl to make a certificate with")
    files = ("--ssl-certfile", str(cert), "--ssl-keyfile", str(key))
    with serving("--model", str(tiny_folder), *files) as process:
        assert process.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(cert))
        assert httpx.get(f"{process.url}/health", verify=trusting).json()["status"] == "ok"


@pytest.mark.skipif(sys.platform == "win32", reason="Unix sockets")
def test_a_unix_socket(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving("--model", str(tiny_folder), "--uds", str(path)) as process:
        assert process.url == f"unix:{path}"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://any.name/health").json()["status"] == "ok"
        taken = said_by("--model", str(tiny_folder), "--uds", str(path))
        assert "another server" in taken
    assert not path.exists()


@pytest.mark.parametrize("name", ["Origin", "Authorization", "Content-Type"])
def test_a_header_that_decides_access_is_sent_once(server: Process, name: str) -> None:
    """A proxy may have checked the other one."""
    values = {"Origin": server.url, "Content-Type": "application/json"}
    pair = [(name, values.get(name, "Bearer a")), (name, "https://evil.example")]
    response = httpx.get(f"{server.url}/v1/models", headers=pair)
    assert response.status_code == 400
    assert message(response) == f"found 2 {name.lower()} headers, expected one"


def test_an_encoded_body_is_refused_by_its_encoding(server: Process) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = httpx.post(f"{server.url}/tokenize", content=b"\x1f\x8b", headers=headers)
    assert response.status_code == 415
    assert message(response) == "Content-Encoding is gzip, expected a body without it"


def test_requests_that_are_not_http_do_not_fill_the_log() -> None:
    kept = OnceInAWhile()

    def logged(level: int, text: str) -> bool:
        return kept.filter(logging.LogRecord("uvicorn.error", level, "", 0, text, (), None))

    warning = "Invalid HTTP request received."
    assert logged(logging.WARNING, warning)
    assert not logged(logging.WARNING, warning)
    assert logged(logging.WARNING, "Unsupported upgrade request.")
    assert [logged(logging.ERROR, "failed") for _ in range(2)] == [True, True]
    kept.seconds = 0
    assert logged(logging.WARNING, warning)
