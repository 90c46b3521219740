"""Checks who may ask: foreign hosts and origins get 403 on every path, and away from loopback whoever lacks a token gets 401."""
import contextlib
import json
import re
import socket
import stat

import pytest

import nodes
from conftest import check_error

EXAMPLES = {"id": "tiny", "layer": "0", "expert": "0", "peer": "12D3KooWMwaKhUUeDBoTQPeop91Mt7CN6yG6P1sWEAr7yR4jd9dG"}
OPEN = {"/", "/health"}  # and what is under /dashboard/
BODY = {"model": "tiny", "prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
FOREIGN_HOSTS = [
    "evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", "evil.example:127.0.0.1", "127.0.0.1@evil.example",
    "localhost:{port}@evil.example", "127.0.0.1:{port}.evil.example", "xn--localhost", "", "local host", "evil.example#127.0.0.1",
]
FOREIGN_ORIGINS = [
    "http://evil.example", "http://127.0.0.1:1", "http://127.0.0.1", "null", "http://127.0.0.1:{port}.evil.example", "file://",
    "http://evil.example:{port}", "", "ftp://127.0.0.1:{port}", "127.0.0.1:{port}",
]


def paths(serving, **headers):
    """Every method and path that /openapi.json tells of, and some that it need not tell of."""
    document = serving.http.get("/openapi.json", headers=headers).raise_for_status().json()
    for path, operations in document["paths"].items():
        filled = re.sub(r"\{(\w+)\}", lambda name: EXAMPLES[name[1]], path)
        yield from ((method.upper(), filled) for method in operations if method in ("get", "post", "put", "delete", "patch"))
    yield from (("GET", path) for path in ("/", "/openapi.json", "/health", "/metrics", "/nothing", "/v1/nothing", "/dashboard/nothing"))


def ask(serving, method, path, **headers):
    """An answer, without what follows its head where that has no end."""
    body = {"json": BODY} if method == "POST" else {}
    with serving.http.stream(method, path, headers=headers, **body) as answer:
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            answer.read()
    return answer


def raw(serving, text):
    """The status that a request gets which no library would send."""
    with contextlib.closing(socket.create_connection(("127.0.0.1", serving.port), timeout=30)) as connection:
        connection.sendall(text.format(port=serving.port).encode())
        answer = connection.recv(4096)
    return int(answer.split()[1]) if answer else None


def test_there_are_paths(tiny):
    known = {path for _, path in paths(tiny)}
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/tiny", "/api/node", "/api/peers", "/api/events"} <= known


def test_a_foreign_host_is_refused_on_every_path(tiny):
    for method, path in paths(tiny):
        if path == "/health":  # it tells nothing but that the node is there
            assert ask(tiny, method, path, host=f"evil.example:{tiny.port}").status_code == 200
            continue
        check_error(ask(tiny, method, path, host=f"evil.example:{tiny.port}"), 403, "permission_error", {"forbidden_host"})


def test_a_foreign_origin_is_refused_on_every_path(tiny):
    for method, path in paths(tiny):
        if path == "/health":
            continue
        check_error(ask(tiny, method, path, origin="http://evil.example"), 403, "permission_error", {"forbidden_origin"})


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_no_such_host_passes(tiny, host):
    assert raw(tiny, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n") in (400, 403)


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_no_such_origin_passes(tiny, origin):
    head = f"GET /api/node HTTP/1.1\r\nHost: 127.0.0.1:{{port}}\r\nOrigin: {origin}\r\nConnection: close\r\n\r\n"
    assert raw(tiny, head) == 403


@pytest.mark.parametrize(
    "head", ["GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.0\r\n\r\n", "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n"],
    ids=["no host", "no host in 1.0", "two hosts"],
)
def test_neither_none_nor_two(tiny, head):
    assert raw(tiny, head) in (400, 403)


def test_a_load_balancer_may_ask_for_health_without_a_host(tiny):
    assert raw(tiny, "GET /health HTTP/1.0\r\n\r\n") == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:{port}", "localhost", "localhost:{port}", "[::1]:{port}", "192.0.2.7:{port}"])
def test_addresses_and_localhost_pass(tiny, host):
    assert raw(tiny, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n") == 200


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "[::1]:{port}"])
def test_the_api_s_own_origin_passes(tiny, host):
    assert raw(tiny, f"GET /api/node HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nConnection: close\r\n\r\n") == 200


def test_nobody_is_told_of_other_origins(tiny):
    for method, path in [*paths(tiny), ("OPTIONS", "/v1/chat/completions")]:
        for headers in ({"origin": "http://evil.example", "access-control-request-method": "POST"}, {}):
            answer = ask(tiny, method, path, **headers)
            assert not [name for name in answer.headers if name.startswith("access-control-")], f"{method} {path}"


def test_a_name_may_be_given():
    with nodes.node_with() as node, node.serve("--api-name", "confrere.test") as serving:
        assert ask(serving, "GET", "/api/node", host="confrere.test").status_code == 200
        assert ask(serving, "GET", "/api/node", host="confrere.test", origin="http://confrere.test").status_code == 200
        assert ask(serving, "GET", "/api/node", host="other.test").status_code == 403


@pytest.mark.parametrize(
    "path, host, kind, status",
    [("/v1/completions", "evil.example", "application/json", 403), ("/v1/completions", "127.0.0.1", "text/plain", 415),
     ("/v1/nothing", "127.0.0.1", "application/json", 404), ("/v1/models", "127.0.0.1", "application/json", 405)],
)
def test_after_a_refusal_the_connection_goes_on_or_is_said_to_end(tiny, path, host, kind, status):
    """Clients keep connections: what they send next on one that ends unsaid is lost."""
    body = json.dumps(BODY).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    with contextlib.closing(socket.create_connection(("127.0.0.1", tiny.port), timeout=30)) as connection:
        connection.sendall(head.encode())
        answer = connection.recv(65536)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer
        if b"connection: close" in answer.lower():
            return
        with contextlib.suppress(ConnectionError):
            connection.sendall(body + b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 "), f"the next request got {answer[:100]!r}"


# ---- tokens

@pytest.fixture(scope="module")
def public():
    """A node whose API is not on loopback alone, and its token."""
    with nodes.node_with("tiny") as node, node.serve(api="0.0.0.0:0") as serving:
        file = node.directory / "api-token"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        yield serving, file.read_text().strip()


def test_without_a_token_nothing_but_the_door_opens(public):
    serving, token = public
    good = f"Bearer {token}"
    for method, path in paths(serving, authorization=good):
        wrong = [{}, *({"authorization": value} for value in ("Bearer", "Bearer none", good[:-1], f"{good}x", f"Basic {token}", token))]
        for headers in wrong:
            answer = ask(serving, method, path, **headers)
            if path in OPEN or path.startswith("/dashboard/"):
                assert answer.status_code != 401, f"{method} {path} asks for a token"
            else:
                check_error(answer, 401, "authentication_error", {"invalid_api_key"})


def test_with_the_token_everything_opens(public):
    serving, token = public
    for method, path in paths(serving, authorization=f"Bearer {token}"):
        assert ask(serving, method, path, authorization=f"Bearer {token}").status_code not in (401, 403), f"{method} {path}"


def test_a_token_in_the_address_is_none(public):
    serving, token = public
    for name in ("token", "api_key", "access_token"):
        assert ask(serving, "GET", f"/api/node?{name}={token}").status_code == 401


def test_hosts_and_origins_are_refused_there_too(public):
    serving, token = public
    for path in ("/", "/api/node", "/v1/models"):
        assert ask(serving, "GET", path, authorization=f"Bearer {token}", host="evil.example").status_code == 403
        assert ask(serving, "GET", path, authorization=f"Bearer {token}", origin="http://evil.example").status_code == 403


def test_the_token_stays_when_the_node_starts_again():
    with nodes.node_with() as node:
        tokens = set()
        for _ in range(2):
            with node.serve(api="0.0.0.0:0") as serving:
                tokens.add((node.directory / "api-token").read_text())
                assert ask(serving, "GET", "/api/node").status_code == 401
        assert len(tokens) == 1 and len(tokens.pop().strip()) >= 32


def test_tokens_from_a_file(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("first-token-of-the-file\n\nsecond-token-of-the-file\n")
    file.chmod(0o600)
    with nodes.node_with() as node, node.serve("--api-tokens", str(file), api="0.0.0.0:0") as serving:
        for token, status in [("first-token-of-the-file", 200), ("second-token-of-the-file", 200), ("third", 401)]:
            assert ask(serving, "GET", "/api/node", authorization=f"Bearer {token}").status_code == status, token
        empty = "GET /api/node HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer \r\nConnection: close\r\n\r\n"
        assert raw(serving, empty) == 401, "the empty line of the file"
        assert not (node.directory / "api-token").exists()


def test_a_file_of_tokens_that_others_can_read_is_refused(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("a-token-that-others-can-read\n")
    file.chmod(0o644)
    with nodes.node_with() as node, pytest.raises(AssertionError, match="ended before it printed"):
        with node.serve("--api-tokens", str(file), api="0.0.0.0:0"):
            pass
