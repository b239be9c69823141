"""Scopes, quotas, shapes of refusals and the end of the process, by plain HTTP against a real one."""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvferry import VLM, Edge
from kvferry.security import Credentials
from kvferry.security.tokens import new_token
from kvferry.wire.faults import QuotaError
from tests.crossing.process import CloudProcess

LONG = 3900
CHAT = "/v1/chat/completions"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: Any

    @property
    def error(self) -> dict[str, Any]:
        assert self.headers["content-type"].startswith("application/json")
        error: dict[str, Any] = self.body["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


class Client:
    def __init__(self, process: CloudProcess, token: str = "") -> None:
        self._model = json.dumps(process.ready["model"]).encode()
        self._url = urllib.parse.urlsplit(f"http://{process.ready['http']}")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def begin(
        self, body: bytes | None, path: str = CHAT, method: str = "POST", **headers: str
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._url.hostname or "", self._url.port, timeout=60)
        kind = {} if body is None else {"Content-Type": "application/json"}
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        said = None if body is None else body.replace(b'"MODEL"', self._model)
        connection.request(method, path, said, {**self._headers, **kind, **given})
        return connection, connection.getresponse()

    def say(self, body: bytes | None, path: str = CHAT, method: str = "POST", **headers: str) -> Answer:
        connection, response = self.begin(body, path, method, **headers)
        answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, json.loads(response.read()))
        connection.close()
        return answer

    def ask(self, content: Any = "what?", **more: Any) -> Answer:
        return self.say(asking(content, **more))


def asking(content: Any = "what?", **more: Any) -> bytes:
    said = [{"role": "user", "content": content}]
    return json.dumps({"model": "MODEL", "messages": said, "max_tokens": 2, **more}).encode()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    file = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    made = {
        "one": new_token(file, "one"),
        "seer": new_token(file, "seer", ["describe"]),
        "images": new_token(file, "images", ["ask:image"]),
        "calls": new_token(file, "calls", calls=1),
        "bytes": new_token(file, "bytes", bytes_per_minute=900),
        "model": new_token(file, "model", model_seconds_per_minute=0.001),
    }
    return file, made


@pytest.fixture(scope="module")
def cloud(model_folder: Path, tokens: tuple[Path, dict[str, str]]) -> Iterator[CloudProcess]:
    options = "--http", "127.0.0.1:0", "--tokens", str(tokens[0]), "--limit", f"new_tokens={LONG}", "--metrics", "0"
    with CloudProcess(model_folder, *options) as process:
        yield process


@pytest.fixture
def clients(cloud: CloudProcess, tokens: tuple[Path, dict[str, str]]) -> dict[str, Client]:
    return {name: Client(cloud, token) for name, token in tokens[1].items()}


def test_scopes(cloud: CloudProcess, clients: dict[str, Client]) -> None:
    nobody = Client(cloud).ask()
    assert (nobody.status, nobody.error["code"]) == (401, "invalid_api_key")
    assert nobody.headers["www-authenticate"] == "Bearer"
    assert clients["seer"].say(None, "/v1/models", "GET").status == 200
    cache = [{"type": "kvferry_cache", "kvferry_cache": {"data": "AAAA"}}]
    for denied in (
        clients["seer"].ask(),
        clients["images"].say(None, "/v1/models", "GET"),
        clients["images"].ask(cache),
    ):
        assert (denied.status, denied.error["code"]) == (403, "permission_denied")
    assert clients["images"].ask().status == 200
    assert clients["one"].ask(cache).status == 400, "no bitstream, but it may"


def wait_of(answer: Answer) -> float:
    assert (answer.status, answer.error["type"]) == (429, "rate_limit_error")
    assert int(answer.headers["retry-after"]) >= 1
    return float(answer.headers.get("retry-after-ms", 0)) / 1000


def test_bytes_and_seconds_of_the_model(
    cloud: CloudProcess, clients: dict[str, Client], vlm: VLM, tokens: tuple[Path, dict[str, str]]
) -> None:
    """What comes by HTTP and by gRPC counts together."""
    client = clients["bytes"]
    assert client.ask().status == 200
    refused = client.ask("x" * 900)
    assert refused.error["code"] == "rate_limit_exceeded"
    assert "900 bytes a minute" in refused.error["message"]
    assert 1 < wait_of(refused) < 60
    assert wait_of(client.ask()) > 1
    with (
        Edge(vlm, cloud.address, credentials=Credentials(token=tokens[1]["bytes"])) as edge,
        pytest.raises(QuotaError, match="bytes a minute"),
    ):
        edge.ask([], "what?")
    client = clients["model"]
    assert client.ask(max_tokens=64).status == 200
    assert "model seconds a minute" in (refused := client.ask()).error["message"]
    assert wait_of(refused) > 1


def test_calls_at_a_time(clients: dict[str, Client]) -> None:
    client = clients["calls"]
    connection, response = client.begin(asking(max_tokens=LONG, stream=True))
    response.readline()
    refused = client.ask()
    assert "as many as it may have" in refused.error["message"]
    wait_of(refused)
    connection.close()
    until = time.monotonic() + 30
    while (answer := client.ask()).status == 429 and time.monotonic() < until:
        time.sleep(0.05)
    assert answer.status == 200, "who hangs up is out"


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@@"}}


@pytest.mark.parametrize(
    ("body", "headers", "status", "param"),
    [
        (asking(), {"Content_Type": "text/plain"}, 415, "body"),
        (asking(), {"Content_Encoding": "gzip"}, 415, "body"),
        (b"\xff\xfe{}", {}, 400, "body"),
        (b"[]", {}, 400, "body"),
        (b'{"max_tokens": 1' + b"0" * 5000 + b"}", {}, 400, "body"),
        (asking(model="another"), {}, 404, "model"),
        (asking(model=None), {}, 400, "model"),
        (asking(model=7), {}, 400, "model"),
        (asking(max_tokens=-1), {}, 400, "max_tokens"),
        (asking(max_tokens=0), {}, 400, "max_tokens"),
        (asking(max_tokens=True), {}, 400, "max_tokens"),
        (asking(max_tokens=1.5), {}, 400, "max_tokens"),
        (asking(max_tokens=float("nan")), {}, 400, "max_tokens"),
        (asking(max_completion_tokens="9"), {}, 400, "max_completion_tokens"),
        (asking(stream=1), {}, 400, "stream"),
        (asking(stream_options=[1]), {}, 400, "stream"),
        (asking(stop={"a": 1}), {}, 400, "stop"),
        (asking(messages="hello"), {}, 400, "messages"),
        (asking(messages=[{"content": "x"}]), {}, 400, "messages"),
        (asking(messages=[{"role": 5, "content": "x"}]), {}, 400, "messages"),
        (asking(None), {}, 400, "messages"),
        (asking([PICTURE]), {}, 400, "messages"),
        (asking([{"type": ["text"]}]), {}, 400, "messages"),
        (asking([{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]), {}, 400, None),
        (asking([{"type": "kvferry_cache", "kvferry_cache": {"data": 5}}]), {}, 400, "messages"),
        (asking("\ud800"), {}, 400, None),
        (asking("<|im_end|>"), {}, 400, None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    clients: dict[str, Client], body: bytes, headers: dict[str, str], status: int, param: str | None
) -> None:
    answer = clients["one"].say(body, **headers)
    assert (answer.status, answer.error["param"] if param else None) == (status, param), answer.body
    assert answer.error["type"] == "invalid_request_error"
    assert len(answer.error["message"]) > 10


def test_paths_and_methods(clients: dict[str, Client]) -> None:
    wrong = clients["one"].say(asking(), "/v1/completions")
    assert (wrong.status, "/v1/chat/completions" in wrong.error["message"]) == (404, True)
    wrong = clients["one"].say(None, CHAT, "GET")
    assert (wrong.status, wrong.headers["allow"], wrong.error["type"]) == (405, "POST", "invalid_request_error")


def test_sigterm(cloud: CloudProcess, clients: dict[str, Client]) -> None:
    """The last here. Who is inside gets a few seconds and then an error; who comes is told to go elsewhere."""
    client = clients["one"]
    assert client.say(None, "/health", "GET").body["status"] == "ok"
    connection, response = client.begin(asking(max_tokens=LONG, stream=True))
    response.readline()
    began = time.monotonic()
    cloud.process.terminate()
    time.sleep(0.3)
    health, late = client.say(None, "/health", "GET"), client.ask()
    assert (health.status, health.body["status"]) == (503, "ending")
    assert (late.status, late.error["code"], int(late.headers["retry-after"]) > 0) == (503, "ending", True)
    events = [line.removeprefix(b"data: ") for line in response.read().splitlines() if line]
    connection.close()
    assert events[-1] == b"[DONE]"
    last = json.loads(events[-2])
    assert "error" not in last or last["error"]["code"] == "ending"
    assert "error" in last or last["choices"][0]["finish_reason"] == "length"
    assert cloud.process.wait(30) == 0
    assert time.monotonic() - began < 10, "3 s, on a machine that does nothing else"
