"""OpenAI's own client against a real process: the answers are the model's, and what cannot be honoured is refused."""

from __future__ import annotations

import base64
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from kvferry import VLM, Edge, compress, decompress
from kvferry.messages import Messages
from kvferry.security.tokens import new_token
from kvferry.wire import service_pb2 as pb
from tests.crossing.hostile.attacks import Attacker
from tests.crossing.process import CloudProcess

QUESTION = "what colour is the circle?"
RECIPE = "q2c@0.25|int4"
NEW = 12


@pytest.fixture(scope="module")
def cloud(model_folder: Path) -> Iterator[CloudProcess]:
    with CloudProcess(model_folder, "--http", "127.0.0.1:0", "--max-bytes", "450000") as process:
        assert process.ready
        yield process
        assert process.stop() == 0


@pytest.fixture(scope="module")
def client(cloud: CloudProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{cloud.ready['http']}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(client: openai.OpenAI, model_folder: Path) -> str:
    """Of a folder here others are told the last part."""
    (only,) = client.models.list().data
    assert only.id == model_folder.name
    return only.id


def shown(path: Path) -> dict[str, Any]:
    data = base64.b64encode(path.read_bytes()).decode()
    return at(f"data:image/png;base64,{data}")


def at(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def asked(*parts: dict[str, Any], text: str = QUESTION) -> list[Any]:
    return [{"role": "user", "content": [*parts, *([{"type": "text", "text": text}] if text else [])]}]


def test_a_picture(client: openai.OpenAI, model: str, vlm: VLM, picture: Path) -> None:
    done = client.chat.completions.create(model=model, messages=asked(shown(picture)), max_tokens=NEW, temperature=0)
    prefilled = vlm.prefill([picture], QUESTION)
    (choice,) = done.choices
    assert choice.message.content == vlm.answer(prefilled, max_new_tokens=NEW)
    assert choice.finish_reason == "length"
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(prefilled.cache.layout), NEW)


def test_in_pieces(client: openai.OpenAI, model: str, vlm: VLM, picture: Path) -> None:
    stream = client.chat.completions.create(
        model=model, messages=asked(shown(picture)), max_completion_tokens=NEW, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    said = [x.choices[0].delta.content for x in chunks if x.choices and x.choices[0].delta.content]
    assert len(said) > NEW // 2
    assert "".join(said) == vlm.answer(vlm.prefill([picture], QUESTION), max_new_tokens=NEW)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == NEW
    assert chunks[-2].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_stop(client: openai.OpenAI, model: str, vlm: VLM, stream: bool) -> None:
    """The answer ends before the text that stops it, wherever that begins and ends among its tokens."""
    whole = vlm.answer(vlm.prefill((), QUESTION), max_new_tokens=NEW)
    stop = whole[len(whole) // 2 - 1 : len(whole) // 2 + 3]
    request: dict[str, Any] = {"model": model, "messages": asked(), "max_tokens": NEW, "stop": ["\x00", stop]}
    if stream:
        chunks = list(client.chat.completions.create(**request, stream=True))
        said = "".join(x.choices[0].delta.content or "" for x in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        (choice,) = client.chat.completions.create(**request).choices
        said, finish = choice.message.content, choice.finish_reason
    assert (said, finish) == (whole[: whole.index(stop)], "stop")


def test_a_cache_instead_of_a_picture(client: openai.OpenAI, model: str, vlm: VLM, picture: Path) -> None:
    """With its question in it, or with one asked on top: as an edge would be answered."""
    for question in (QUESTION, None):
        recipe = RECIPE if question else "knorm@0.5|int8"
        blob = compress(vlm.prefill([picture], question, recipe=recipe), recipe)
        part = {"type": "kvferry_cache", "kvferry_cache": {"data": base64.b64encode(blob).decode()}}
        done = client.chat.completions.create(
            model=model, messages=asked(part, text="" if question else QUESTION), max_tokens=NEW
        )
        expected = vlm.answer(decompress(blob), None if question else QUESTION, max_new_tokens=NEW)
        assert done.choices[0].message.content == expected


def test_a_conversation(client: openai.OpenAI, model: str, vlm: VLM, picture: Path) -> None:
    messages = [*asked(shown(picture)), {"role": "assistant", "content": "red"}, {"role": "user", "content": "why?"}]
    done = client.chat.completions.create(model=model, messages=messages, max_tokens=NEW)
    own = Messages.parse(
        [
            {"role": "user", "content": [{"type": "image", "path": str(picture)}, {"type": "text", "text": QUESTION}]},
            *messages[1:],
        ]
    )
    assert done.choices[0].message.content == vlm.answer(vlm.prefill(messages=own), max_new_tokens=NEW)


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"temperature": 0.7}, "temperature", "greedy"),
        ({"n": 2}, "n", "greedy"),
        ({"logprobs": True}, "logprobs", "greedy"),
        ({"tools": [{"type": "function", "function": {"name": "x"}}]}, "tools", "greedy"),
        ({"max_tokens": 100_000}, "max_tokens", "1 to 1024"),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"extra_body": {"beam": 4}}, "beam", "not known"),
        ({"messages": []}, "messages", "one message"),
        ({"messages": [{"role": "assistant", "content": "hello"}]}, "messages", "user"),
        ({"messages": asked({"type": "input_audio"})}, "messages", "image_url"),
        ({"messages": asked(at("http://127.0.0.1:1/a.png"))}, "messages", "fetches nothing"),
        ({"messages": asked(at("file:///etc/passwd"))}, "messages", "fetches nothing"),
        ({"messages": asked(at("data:image/tiff;base64,AAAA"))}, "messages", "base64"),
        ({"messages": asked(at("data:image/png;base64,AAAA"))}, None, "picture"),
        ({"messages": asked({"type": "kvferry_cache", "kvferry_cache": {"data": "AAAA"}})}, None, "bitstream"),
    ],
)  # fmt: skip
def test_refused(client: openai.OpenAI, model: str, change: dict[str, Any], param: str | None, says: str) -> None:
    request: dict[str, Any] = {"model": model, "messages": asked(), "max_tokens": 2, **change}
    with pytest.raises(openai.BadRequestError, match=says) as refused:
        client.chat.completions.create(**request)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


def test_other_models_and_too_much(client: openai.OpenAI, cloud: CloudProcess, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match="only"):
        client.chat.completions.create(model="gpt-4o", messages=asked())
    with pytest.raises(openai.APIStatusError, match="450,000 bytes") as refused:
        client.chat.completions.create(model=model, messages=asked(text="x" * 500_000))
    assert refused.value.status_code == 413
    where, kind = f"http://{cloud.ready['http']}/v1/chat/completions", {"Content-Type": "application/json"}
    request = urllib.request.Request(where, data=b"{", headers=kind, method="POST")
    with pytest.raises(urllib.error.HTTPError) as broken:
        urllib.request.urlopen(request, timeout=20)
    assert json.load(broken.value)["error"]["param"] == "body"
    health = json.load(urllib.request.urlopen(f"http://{cloud.ready['http']}/health", timeout=20))
    assert health["status"] == "ok"


def test_what_a_request_may_cost(client: openai.OpenAI, cloud: CloudProcess, model: str, vlm: VLM) -> None:
    """As for edges: refused by name before memory is taken, and a cloud that serves the next one."""
    attacker = Attacker(vlm)
    for attack, says in ((attacker.scans(side=500), "scans"), (attacker.large_pictures(2, 7000), "pixels")):
        files = _files_of(attack)
        assert sum(map(len, files)) < 330_000
        parts = [at(f"data:image/{'png' if x[1:4] == b'PNG' else 'jpeg'};base64,{_base64(x)}") for x in files]
        with pytest.raises(openai.BadRequestError, match=says):
            client.chat.completions.create(model=model, messages=asked(*parts), max_tokens=2)
    url = urllib.parse.urlsplit(f"http://{cloud.ready['http']}")
    for body, size, status in ((b"[" * 100_000, True, 400), (b"{}", False, 411)):
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=20)
        headers = {"Content-Length": str(len(body))} if size else {"Transfer-Encoding": "chunked"}
        headers["Content-Type"] = "application/json"
        sent = body if size else iter([body])
        connection.request("POST", "/v1/chat/completions", sent, headers, encode_chunked=not size)
        assert connection.getresponse().status == status
        connection.close()
    done = client.chat.completions.create(model=model, messages=asked(), max_tokens=2)
    assert done.choices[0].message.content == vlm.answer(vlm.prefill((), QUESTION), max_new_tokens=2)


def _files_of(call: list[pb.AskRequest]) -> list[bytes]:
    data = b"".join(message.chunk.data for message in call)
    ends = np.cumsum([item.size for item in call[0].start.items])
    return [data[end - item.size : end] for item, end in zip(call[0].start.items, ends.tolist(), strict=True)]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_busy_and_who_may_ask(model_folder: Path, vlm: VLM, tmp_path: Path) -> None:
    """A cloud with no place says when to come again, and OpenAI's client does; without a token nobody is let in."""
    file = tmp_path / "tokens.toml"
    token = new_token(file, "one")
    options = ("--http", "127.0.0.1:0", "--together", "1", "--max-waiting", "0", "--tokens", str(file))
    with CloudProcess(model_folder, *options) as process:
        where = f"http://{process.ready['http']}/v1"
        with (
            openai.OpenAI(base_url=where, api_key="nobody", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="token"),
        ):
            client.models.list()
        with openai.OpenAI(base_url=where, api_key=token, max_retries=0) as client:
            (only,) = client.models.list().data
            long = client.chat.completions.create(model=only.id, messages=asked(), max_tokens=1024, stream=True)
            next(iter(long))
            with pytest.raises(openai.RateLimitError, match="before this one") as busy:
                client.chat.completions.create(model=only.id, messages=asked(), max_tokens=2)
            assert float(busy.value.response.headers["retry-after-ms"]) > 0
            long.close()
            patient = client.with_options(max_retries=8)
            done = patient.chat.completions.create(model=only.id, messages=asked(), max_tokens=NEW)
        assert done.choices[0].message.content == vlm.answer(vlm.prefill((), QUESTION), max_new_tokens=NEW)
        assert process.stop() == 0


def test_one_access_line_for_a_chat(model_folder: Path, tmp_path: Path) -> None:
    """As for edges: numbers and names, and counted in the metrics; nothing of what was said."""
    log = tmp_path / "log"
    options = ("--http", "127.0.0.1:0", "--log-format", "json", "--metrics", "0")
    with CloudProcess(model_folder, *options, log=log) as process:
        with openai.OpenAI(base_url=f"http://{process.ready['http']}/v1", api_key="none", max_retries=0) as client:
            (only,) = client.models.list().data
            client.chat.completions.create(model=only.id, messages=asked(), max_tokens=3)
            for piece in client.chat.completions.create(model=only.id, messages=asked(), max_tokens=4, stream=True):
                assert piece.model == only.id
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="another", messages=asked())
        page = urllib.request.urlopen(f"http://{process.ready['metrics']}/metrics", timeout=20).read().decode()
        assert process.stop() == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    told = [line for line in lines if line["logger"] == "kvferry.access"]
    ends = [(x["mode"], x["outcome"], x["tokens"]) for x in told]
    assert ends == [("http", "ok", 3), ("http", "ok", 4), ("http", "input", 0)]
    assert all(x["bytes"] > 0 and x["request_id"].startswith("http-") for x in told)
    assert len({x["request_id"] for x in told}) == 3
    assert told[0]["first_token_seconds"] > 0
    assert 'kvferry_requests_total{mode="http",outcome="ok"} 2.0' in page
    assert QUESTION not in log.read_text()


def test_beside_edges(cloud: CloudProcess, client: openai.OpenAI, model: str, vlm: VLM, picture: Path) -> None:
    with Edge(vlm, cloud.address) as edge:
        stream = client.chat.completions.create(model=model, messages=asked(), max_tokens=200, stream=True)
        next(iter(stream))
        assert edge.ask([picture], QUESTION, recipe=RECIPE).tokens == 16
        assert sum(1 for _ in stream) > 100
