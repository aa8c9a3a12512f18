# SPDX-License-Identifier: Apache-2.0
"""Who may come in, how much they may send, and what is never an error of the server."""

import contextlib
import http.client
import json
import random
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from served import ANSWER, FakeService, refused, serving
from starlette.routing import Mount

from ospec_jax.config import ConfigError
from ospec_jax.serving.http import check_address, make_app
from ospec_jax.serving.settings import HttpConfig

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
CHAT_PATH = "/v1/chat/completions"
ADMIN = "admin-key-of-the-test"
ADA = "key-of-ada-0001"
BOB = "key-of-bob-0002"


class Answer:
    """A response, read to its end."""

    def __init__(self, response: http.client.HTTPResponse):
        self.status = response.status
        self.headers = response.headers
        self.content = response.read()

    @property
    def error(self) -> dict:
        """Its error, in OpenAI's form."""
        error = json.loads(self.content)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error


def ask(address, path, body=None, method=None, key=None, headers=()):
    """Sends one request; a body that is no bytes goes as JSON."""
    place = urlsplit(address)
    sent = dict(headers)
    if body is not None:
        sent = {"Content-Type": "application/json"} | sent
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
    if key is not None:
        sent["Authorization"] = f"Bearer {key}"

    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=10)
    with contextlib.closing(connection):
        connection.request(
            method or ("GET" if body is None else "POST"), path, body, sent
        )
        return Answer(connection.getresponse())


@pytest.fixture(scope="module")
def open_place():
    """A service and its address; there are no keys."""
    service = FakeService()
    config = HttpConfig(
        port=0,
        max_body_bytes=20_000,
        max_prompt_bytes=5000,
        max_header_bytes=4000,
        body_seconds=0.5,
        prepare_seconds=0.5,
    )
    with serving(service, config) as address:
        yield service, address


@pytest.fixture(scope="module")
def keyed_place(tmp_path_factory):
    """A service and its address; two clients have keys, and the administration."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "api").write_text(f"# of clients\nada {ADA}\nbob {BOB} share\n")
    (folder / "admin").write_text(ADMIN + "\n")
    service = FakeService()
    config = HttpConfig(
        port=0, api_key_file=folder / "api", admin_key_file=folder / "admin"
    )
    with serving(service, config) as address:
        yield service, address


@pytest.fixture
def open_server(open_place):
    """The address of the server without keys."""
    return open_place[1]


@pytest.fixture
def keyed(keyed_place):
    """The service with keys, as it was in the beginning, and its address."""
    service, address = keyed_place
    service.error = None
    service.version = 3
    service.may_go.set()
    service.waits.clear()
    service.actions.clear()
    service.tickets.clear()
    return service, address


def test_health_readiness_and_version(open_place):
    service, address = open_place
    assert ask(address, "/health").status == 200
    assert ask(address, "/ready").status == 200
    assert json.loads(ask(address, "/version").content)["version"]
    service.is_ready = False
    assert ask(address, "/health").status == 200
    assert ask(address, "/ready").status == 503
    service.is_ready = True
    service.is_alive = False
    assert ask(address, "/health").status == 503
    assert ask(address, CHAT_PATH, CHAT).status == 503
    service.is_alive = True


def test_without_keys_anybody_on_this_machine_may_ask(open_server):
    assert ask(open_server, CHAT_PATH, CHAT).status == 200
    assert ask(open_server, "/metrics").status == 200
    assert ask(open_server, "/status").status == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "localhost.x"])
def test_without_keys_no_page_has_its_name_lead_here(open_server, host):
    answer = ask(open_server, CHAT_PATH, CHAT, headers={"Host": host})
    assert answer.status == 403
    assert "Host" in answer.error["message"]


@pytest.mark.parametrize(
    "host", ["localhost:1", "127.0.0.1", "[::1]:8000", "LOCALHOST"]
)
def test_names_of_loopback_are_known(open_server, host):
    assert ask(open_server, CHAT_PATH, CHAT, headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", ""]
)
def test_no_page_can_ask_without_being_asked_first(open_server, kind):
    answer = ask(open_server, CHAT_PATH, CHAT, headers={"Content-Type": kind})
    assert answer.status == 415
    preflight = ask(open_server, CHAT_PATH, method="OPTIONS")
    assert preflight.status == 405
    assert "access-control-allow-origin" not in preflight.headers


@pytest.mark.parametrize(
    "path",
    [
        CHAT_PATH,
        "/v1/models",
        "/metrics",
        "/status",
        "/nowhere",
        "//v1/models",
        "/V1/models",
        "/health/",
        "/static",
    ],
)
@pytest.mark.parametrize("key", [None, "wrong", ADA + "x", ADA[:-1], ""])
def test_with_keys_nobody_else_comes_in(keyed, path, key):
    body = CHAT if path == CHAT_PATH else None
    answer = ask(keyed[1], path, body, key=key)
    assert answer.status == 401
    assert answer.error["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_host_header_opens_nothing(keyed):
    for host in ("localhost/health?", "localhost/static/"):
        assert ask(keyed[1], "/v1/models", headers={"Host": host}).status in (400, 401)


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/"])
def test_what_anybody_may_see(keyed, path):
    assert ask(keyed[1], path).status == 200


def test_scopes_are_the_keys_names(keyed):
    service, address = keyed
    assert ask(address, CHAT_PATH, CHAT, key=ADA).status == 200
    assert ask(address, CHAT_PATH, CHAT | {"tenant": "t"}, key=BOB).status == 200
    assert [asked.scope for asked in service.asks] == ["ada", "bob/t"]
    assert [asked.is_shared for asked in service.asks] == [False, True]


def test_who_needs_no_key_shares(open_place):
    service, address = open_place
    service.tickets.clear()
    assert ask(address, CHAT_PATH, CHAT | {"tenant": "t"}).status == 200
    assert [(asked.scope, asked.is_shared) for asked in service.asks] == [("/t", True)]


def test_of_several_keys_only_who_says_so_teaches(keyed):
    service, address = keyed
    ask(address, CHAT_PATH, CHAT, key=ADA)
    ask(address, CHAT_PATH, CHAT | {"learn": True}, key=ADA)
    assert [asked.can_teach for asked in service.asks] == [False, True]


def test_the_scheme_s_case_does_not_matter(keyed):
    answer = ask(keyed[1], "/v1/models", headers={"Authorization": f"bearer  {ADA}"})
    assert answer.status == 200


ACTIONS = [
    ("/admin/checkpoint", None, ("checkpoint", {})),
    ("/admin/draft/load", {"name": "d"}, ("load", {"name": "d"})),
    ("/admin/draft/promote", {}, ("promote", {})),
    ("/admin/draft/rollback", {}, ("rollback", {})),
    ("/admin/draft/rollback", {"version": 2}, ("rollback", {"version": 2})),
    ("/admin/draft/pin", {}, ("pin", {})),
    ("/admin/draft/unpin", {}, ("unpin", {})),
    ("/admin/learning/pause", {}, ("pause", {})),
    ("/admin/learning/resume", {}, ("resume", {})),
    ("/admin/forget", {"scope": "ada"}, ("forget", {"scope": "ada"})),
    ("/admin/forget", {"is_draft_too": True}, ("forget", {"is_draft_too": True})),
]


@pytest.mark.parametrize(("path", "body", "action"), ACTIONS, ids=str)
def test_the_administration_s_actions(keyed, path, body, action):
    service, address = keyed
    answer = ask(address, path, body, method="POST", key=ADMIN)
    assert answer.status == 200
    assert json.loads(answer.content)["done"] == action[0]
    assert service.actions == [action]


def test_the_draft_is_shown_to_the_administration(keyed):
    answer = json.loads(ask(keyed[1], "/admin/draft", key=ADMIN).content)
    assert answer["draft"]["version"] == 3
    assert answer["learning"]["num_updates"] == 7


@pytest.mark.parametrize(
    "path", ["/admin/draft", "/admin/checkpoint", "/admin", "/admin/x"]
)
def test_the_administration_is_for_nobody_else(keyed, open_server, path):
    service, address = keyed
    method = "POST" if path == "/admin/checkpoint" else "GET"
    assert ask(address, path, method=method, key=ADA).status == 403
    assert ask(address, path, method=method, key="wrong").status == 401
    assert ask(address, path, method=method).status == 401
    assert ask(open_server, path, method=method).status == 403
    assert ask(open_server, path, method=method, key=ADMIN).status == 403
    assert service.actions == []


def test_the_administration_does_not_chat(keyed):
    assert ask(keyed[1], CHAT_PATH, CHAT, key=ADMIN).status == 401
    assert ask(keyed[1], "/status", key=ADMIN).status == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/admin/draft/load", {}, "name"),
        ("/admin/draft/load", {"name": 3}, "name"),
        ("/admin/draft/rollback", {"version": "2"}, "version"),
        ("/admin/draft/pin", {"version": 2}, "version"),
        ("/admin/forget", {"is_draft_too": 1}, "is_draft_too"),
    ],
    ids=str,
)
def test_arguments_of_actions_are_checked(keyed, path, body, param):
    answer = ask(keyed[1], path, body, key=ADMIN)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert keyed[0].actions == []


def test_one_action_at_a_time(keyed):
    service, address = keyed
    service.may_go.clear()
    first = []
    run = lambda: first.append(ask(address, "/admin/checkpoint", {}, key=ADMIN))
    thread = threading.Thread(target=run)
    thread.start()
    while not service.waits.wait(0.01):
        assert thread.is_alive()
    busy = ask(address, "/admin/draft/pin", {}, key=ADMIN)
    assert busy.status == 409
    assert "checkpoint" in busy.error["message"]
    service.may_go.set()
    thread.join()
    assert first[0].status == 200
    assert ask(address, "/admin/draft/pin", {}, key=ADMIN).status == 200


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("no earlier version is kept"), 400),
        (refused(), 503),
        (FileNotFoundError("/secret/place"), 404),
        (RuntimeError("/secret/place"), 500),
    ],
    ids=repr,
)
def test_an_action_that_cannot_be_done_says_why(keyed, error, status):
    keyed[0].error = error
    answer = ask(keyed[1], "/admin/draft/rollback", {}, key=ADMIN)
    assert answer.status == status
    assert "secret" not in answer.error["message"]


def test_a_body_in_parts_is_not_passed_over(keyed):
    service, address = keyed
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=10)
    headers = {
        "Authorization": f"Bearer {ADMIN}",
        "Content-Type": "application/json",
    }
    with contextlib.closing(connection):
        body = iter([b'{"version"', b": 2}"])
        connection.request("POST", "/admin/draft/rollback", body, headers)
        assert connection.getresponse().status == 200
    assert service.actions == [("rollback", {"version": 2})]


def test_acceptance_is_not_told_by_another_way(tmp_path):
    (tmp_path / "api").write_text(f"ada {ADA}")
    (tmp_path / "admin").write_text(ADMIN)
    config = HttpConfig(
        port=0,
        tell_acceptance=False,
        api_key_file=tmp_path / "api",
        admin_key_file=tmp_path / "admin",
    )
    with serving(FakeService(), config) as address:
        for path in ("/status", "/metrics"):
            assert ask(address, path, key=ADA).status == 403
            assert ask(address, path, key=ADMIN).status == 200
        answer = json.loads(ask(address, CHAT_PATH, CHAT, key=ADA).content)
        assert "metrics" not in answer


def test_routes_that_there_are_not(open_server):
    assert ask(open_server, "/v1/embeddings", {}).error["type"] == "not_found_error"
    answer = ask(open_server, CHAT_PATH)
    assert answer.status == 405
    assert "POST" in answer.headers["allow"]
    assert ask(open_server, "/v1/models/").status == 404
    assert ask(open_server, "/static/../http.py").status == 404
    assert ask(open_server, "/static/%2e%2e/http.py").status == 404


def test_bodies_are_bounded_as_they_arrive(open_server):
    answer = ask(open_server, CHAT_PATH, b" " * 20_001)
    assert answer.status == 413
    assert answer.error["code"] == "too_large"
    place = urlsplit(open_server)
    with socket.create_connection((place.hostname, place.port), timeout=10) as sender:
        head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: localhost\r\n"
        head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        sender.sendall(head.encode())
        chunk = b"2000\r\n" + b" " * 0x2000 + b"\r\n"
        sender.sendall(chunk * 3)
        assert b" 413 " in sender.recv(100)


def test_prompts_are_bounded(open_server):
    long = [{"role": "user", "content": "x" * 5001}]
    assert ask(open_server, CHAT_PATH, CHAT | {"messages": long}).status == 413


def test_headers_are_bounded(open_server):
    answer = ask(open_server, CHAT_PATH, CHAT, headers={"X-Long": "x" * 4000})
    assert answer.status == 431
    place = urlsplit(open_server)
    with socket.create_connection((place.hostname, place.port), timeout=10) as sender:
        sender.sendall(b"GET /health HTTP/1.1\r\nX-Endless: " + b"x" * 10_000)
        assert b" 400 " in sender.recv(100)


def test_a_body_that_never_comes_is_given_up(open_server):
    place = urlsplit(open_server)
    with socket.create_connection((place.hostname, place.port), timeout=10) as sender:
        head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: localhost\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        sender.sendall(head.encode())
        assert b" 408 " in sender.recv(100)


def test_a_prompt_that_takes_for_ever_is_given_up(open_place):
    service, address = open_place
    service.preparing_seconds = 1.0
    answer = ask(address, CHAT_PATH, CHAT)
    service.preparing_seconds = 0.0
    assert answer.status == 503
    assert answer.error["code"] == "prepare_timeout"
    assert ask(address, CHAT_PATH, CHAT).status == 200


def test_prompts_that_are_read_are_bounded():
    service = FakeService()
    service.preparing_seconds = 0.3
    config = HttpConfig(port=0, max_preparing=2)
    with serving(service, config) as address, ThreadPoolExecutor(6) as pool:
        found = [pool.submit(ask, address, CHAT_PATH, CHAT) for _ in range(6)]
        statuses = [one.result().status for one in found]
    assert set(statuses) == {200, 503}
    # Whoever was refused may come again: those that were read are counted off.
    service.preparing_seconds = 0.0
    with serving(service, config) as address:
        assert [ask(address, CHAT_PATH, CHAT).status for _ in range(4)] == [200] * 4


def test_chunks_are_gathered_if_asked_for():
    config = HttpConfig(port=0, stream_interval=0.3)
    with serving(FakeService(), config) as address:
        answer = ask(address, CHAT_PATH, CHAT | {"stream": True})
    chunks = answer.content.decode().strip().split("\n\n")
    said = [json.loads(c.removeprefix("data: ")) for c in chunks[:-1]]
    contents = [c["choices"][0]["delta"].get("content", "") for c in said]
    assert "".join(contents) == ANSWER
    assert len(said) <= 4


def test_every_answer_carries_what_keeps_browsers_safe(open_server):
    for path in ("/", "/health", "/nowhere", "/status"):
        headers = ask(open_server, path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-request-id"]
        assert "server" not in headers


def test_no_prompt_is_logged(open_place, caplog):
    service, address = open_place
    with caplog.at_level("DEBUG"):
        for content in ("MY-SECRET", "MY-SECRET refuse me", "MY-SECRET" * 700):
            body = CHAT | {"messages": [{"role": "user", "content": content}]}
            ask(address, CHAT_PATH, body | {"MY-SECRET": 1})
        service.failure = RuntimeError("MY-SECRET")
        ask(address, CHAT_PATH, CHAT)
        service.failure = None
    assert CHAT_PATH in caplog.text
    assert "RuntimeError" in caplog.text
    assert "MY-SECRET" not in caplog.text


def test_status_is_streamed(open_server):
    place = urlsplit(open_server)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", "/status/stream")
        response = connection.getresponse()
        line = response.readline()
        response.close()
    said = json.loads(line.removeprefix(b"data: "))
    assert said["status"]["draft"]["version"] == 3
    assert said["history"]["fields"][0] == "time"


def test_a_dashboard_does_not_keep_the_server_from_ending():
    with serving(FakeService()) as address:
        place = urlsplit(address)
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=10)
        connection.request("GET", "/status/stream")
        response = connection.getresponse()
        response.readline()
    # The server has ended; its last stream, too, in good order.
    response.read()
    connection.close()


def test_the_page_and_its_parts_come_from_here(open_server):
    page = ask(open_server, "/")
    assert page.headers["content-type"].startswith("text/html")
    linked = re.findall(r'(?:src|href)="([^"#]+)"', page.content.decode())
    assert len(linked) >= 2
    for path in linked:
        assert path.startswith("/static/")
        assert ask(open_server, path).status == 200


MUTANTS = (
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    "",
    "x",
    "\ud800",
    [],
    {},
    [[]],
    [{}],
    {"a": 1},
)
NAMES = (
    *("messages", "prompt", "n", "stop", "seed", "temperature", "top_p", "top_k"),
    *("min_p", "logit_bias", "logprobs", "top_logprobs", "max_tokens", "stream"),
    *("stream_options", "prediction", "echo", "speculative", "learn", "tenant"),
    *("max_completion_tokens", "presence_penalty", "tools", "response_format"),
    *("input", "instructions", "include", "text", "reasoning", "max_output_tokens"),
)


BODIES = {
    CHAT_PATH: ("messages", CHAT["messages"]),
    "/v1/completions": ("prompt", "Hi"),
    "/v1/responses": ("input", "Hi"),
}


def mutate(body, draw):
    """Changes a body somewhere."""
    kind = draw.randrange(6)
    if kind == 0:
        body[draw.choice(NAMES)] = draw.choice(MUTANTS)
    elif kind == 1:
        body.pop(draw.choice(list(body) or ["x"]), None)
    elif kind == 2:
        part = {"type": draw.choice(["text", "image_url", 3]), "text": "a"}
        turn = {"role": "user", "content": [part, draw.choice(MUTANTS)]}
        body[draw.choice(["messages", "input"])] = [turn]
    elif kind == 3:
        role = draw.choice(["user", "tool", "developer", *MUTANTS])
        turn = {"role": role, "content": draw.choice(MUTANTS)}
        body[draw.choice(["messages", "input"])] = [turn]
    elif kind == 4:
        body["prompt"] = [draw.choice(MUTANTS) for _ in range(draw.randrange(4))]
    else:
        options = {"include_usage": draw.choice(MUTANTS)}
        body |= {"stream": True, "stream_options": options}


def malformed(seed):
    """A path, and a body in which something is wrong, or at times nothing."""
    draw = random.Random(seed)
    path = draw.choice(list(BODIES))
    name, prompt = BODIES[path]
    body = {"model": "fake", name: prompt}
    for _ in range(draw.randrange(1, 4)):
        mutate(body, draw)

    content = bytearray(json.dumps(body).encode())
    if draw.random() < 0.3:
        for _ in range(draw.randrange(1, 5)):
            content[draw.randrange(len(content))] = draw.randrange(256)
    if draw.random() < 0.1:
        content = content[: draw.randrange(len(content))]

    return path, bytes(content)


def test_malformed_bodies_are_the_client_s_fault(open_place):
    service, address = open_place
    place = urlsplit(address)
    statuses = []
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=10)
    with contextlib.closing(connection):
        for seed in range(300):
            path, content = malformed(seed)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", path, content, headers)
            answer = Answer(connection.getresponse())
            statuses.append(answer.status)
            assert answer.status < 500, (seed, content)
            if answer.status != 200:
                assert answer.error["message"], (seed, content)
                assert len(answer.content) < 2000
    # Else it would not be known that good ones pass.
    assert 20 < statuses.count(200) < 200
    assert ask(address, CHAT_PATH, CHAT).status == 200


def test_no_address_for_strangers_without_a_key(tmp_path):
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        check_address(HttpConfig(host=host))
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.org"):
        with pytest.raises(ConfigError, match="API key"):
            check_address(HttpConfig(host=host))
        check_address(HttpConfig(host=host, allow_no_key=True))
        check_address(HttpConfig(host=host, api_key_file=tmp_path / "k"))


def test_every_route_is_known_to_the_gate():
    app = make_app(FakeService(), HttpConfig())
    paths = {route.path for route in app.routes if not isinstance(route, Mount)}
    assert "/admin/draft/load" in paths
    others = {p for p in paths if not p.startswith(("/v1/", "/admin/"))}
    assert others == {
        *("/", "/health", "/ready", "/version"),
        *("/metrics", "/status", "/status/stream"),
    }
