"""experiments/serve.py: texts over HTTP, next to each other and refused."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from core import random
from experiments.parts import language_model, web
from experiments.parts.text_service import Pieces
from nets.language.sampling import Options
from tests.experiments import runs
from tests.experiments.gpt_runs import QUICK, TEXT
from tests.experiments.gpt_runs import call as train

for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from tests.experiments.services import events, running  # noqa: E402

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run of a small GPT."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        assert train(*QUICK, "--steps", "30", "--name", "a") == 0
    return folder


@pytest.fixture(scope="module")
def service(place):
    limits = web.Limits(tokens=400, megabytes=0.5, queue=32)
    with running(run=place / "runs/gpt/a", slots=16, limits=limits) as service:
        yield service


def alone(place, prompt, steps, seed, **options):
    """The text that the net writes by itself."""
    writer = language_model.of_run(place / "runs/gpt/a")
    ids, key = language_model.ids_of(writer, prompt), random.key(seed)
    with torch.inference_mode():
        stream = writer.net.stream(
            writer.params, torch.tensor([ids]), writer.cfg, steps, key=key[None], options=Options(**options)
        )
        return language_model.text_of(writer, [int(token) for token in stream])


@pytest.mark.parametrize("prompt", ["The 3 quick", "T", ""])
def test_text_is_that_of_the_net_alone(service, place, prompt):
    """Beyond the context of 64 tokens too."""
    options = {"temperature": 0.9, "top_p": 0.8}
    answer = service.json(PATH, {"prompt": prompt, "max_tokens": 100, "seed": 3, **options})
    (choice,) = answer["choices"]
    assert choice["text"] == alone(place, prompt, 100, 3, **options) and choice["finish_reason"] == "length"
    count = len(prompt) or 1
    assert answer["usage"] == {"prompt_tokens": count, "completion_tokens": 100, "total_tokens": count + 100}
    assert answer["model"] == "gpt/a" and answer["seed"] == 3 and answer["object"] == "text_completion"


def test_streamed_text_is_the_whole_text(service):
    body = {"prompt": "The ", "max_tokens": 50, "seed": 4}
    status, headers, data = service.ask(PATH, body | {"stream": True})
    *parts, done = events(data)
    assert status == 200 and headers["content-type"].startswith("text/event-stream") and done == "data: [DONE]"
    assert "".join(part["choices"][0]["text"] for part in parts) == service.text(**body)
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert parts[-1]["usage"]["completion_tokens"] == 50 and len({part["id"] for part in parts}) == 1


def test_text_does_not_depend_on_its_neighbours(service):
    """16 at once, of 16 lengths; two of them with one seed."""
    bodies = [
        {"prompt": "The lazy dogs"[: 4 + i % 9], "max_tokens": 20 + 3 * i, "seed": i, "temperature": 0.5 + i % 3}
        for i in range(15)
    ]
    bodies.append(bodies[-1])
    expected = [service.text(**body) for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda body: service.text(**body), bodies)) == expected
    assert expected[-1] == expected[-2] and len(set(expected)) == 15


def test_new_seed_each_time_is_named_and_gives_the_text_again(service):
    first, second = (service.json(PATH, {"prompt": "The ", "max_tokens": 40}) for _ in range(2))
    assert first["seed"] != second["seed"] and first["choices"] != second["choices"]
    assert service.text(prompt="The ", max_tokens=40, seed=first["seed"]) == first["choices"][0]["text"]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-30},
        {"temperature": 1e300},
        {"top_k": 2**40},
        {"top_p": 1e-9},
        {"min_p": 1},
        {"seed": -(2**63)},
    ],
    ids=str,
)
def test_extremes_are_written(service, options):
    assert len(service.text(prompt="The ", max_tokens=9, **{"seed": 1} | options)) == 9


def test_stop_text_ends_and_is_no_part(service):
    whole = service.text(prompt="The ", max_tokens=100, seed=5)
    stop = whole[20:23]
    body = {"prompt": "The ", "max_tokens": 100, "seed": 5, "stop": ["\x00", stop]}
    (choice,) = service.json(PATH, body)["choices"]
    assert choice["text"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"
    *parts, _ = events(service.ask(PATH, body | {"stream": True})[2])
    assert "".join(part["choices"][0]["text"] for part in parts) == choice["text"]


def test_what_others_send_and_asks_for_nothing_is_taken(service):
    usual = {"model": "gpt/a", "n": 1, "echo": False, "logprobs": None, "presence_penalty": 0.0, "user": "me"}
    usual |= {"frequency_penalty": 0, "logit_bias": {}, "suffix": None, "best_of": 1, "stop": None, "top_k": -1}
    body = {"prompt": "The ", "max_tokens": 5, "seed": 1}
    assert service.text(**body, **usual) == service.text(**body)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the body is no JSON"),
        (b"", 400, "the body is no JSON"),
        (b"\xff\xfe", 400, "the body is no JSON"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "NaN is no number of JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "temperature is Infinity; expected at least 0"),
        (["The "], 400, "the body is a JSON list; expected an object"),
        ({}, 400, "prompt is missing; expected a text"),
        ({"prompt": None}, 400, "prompt is null; expected a text"),
        ({"prompt": ["a", "b"]}, 400, 'prompt is ["a", "b"]; expected a text'),
        ({"prompt": "a\u4e00"}, 400, "prompt: character '\u4e00' at position 1 is not among"),
        ({"prompt": "a\ud800"}, 400, "prompt has half of a surrogate pair"),
        ({"prompt": "a" * 65}, 400, "the prompt has 65 tokens; expected 1 to 64"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens is 0; expected an integer, at least 1"),
        ({"prompt": "a", "max_tokens": 401}, 400, "max_tokens is 401; expected up to 400"),
        ({"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens is 1.5; expected an integer"),
        ({"prompt": "a", "max_tokens": "9"}, 400, 'max_tokens is "9"; expected an integer'),
        ({"prompt": "a", "max_tokens": True}, 400, "max_tokens is true; expected an integer"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature is -1; expected at least 0"),
        ({"prompt": "a", "temperature": 10**400}, 400, "; expected a number below 1e308"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p is 0; expected a number in (0, 1]"),
        ({"prompt": "a", "min_p": 2}, 400, "min_p is 2; expected a number in (0, 1]"),
        ({"prompt": "a", "seed": 2**70}, 400, "seed is 1180591620717411303424; expected an integer"),
        ({"prompt": "a", "stop": [""]}, 400, 'stop is [""]; expected a text'),
        ({"prompt": "a", "stop": ["b"] * 17}, 400, "stop has 17 texts; expected up to 16"),
        ({"prompt": "a", "stop": 3}, 400, "stop is 3; expected a text"),
        ({"prompt": "a", "stream": 1}, 400, "stream is 1; expected true or false"),
        ({"prompt": "a", "n": 2}, 400, "n is not supported here"),
        ({"prompt": "a", "max_new_tokens": 2}, 400, "'max_new_tokens' is unknown; expected some of prompt, max_tokens"),
        ({"prompt": "a" * 400_000}, 400, "the prompt has 400000 tokens; expected 1 to 64"),
        ({"prompt": "a", "model": "../../etc"}, 404, 'the model "../../etc" is not served here; expected "gpt/a"'),
        (b'{"prompt": "' + b"a" * 600_000 + b'"}', 413, "the request is larger than 0.5 MB"),
    ],
    ids=lambda value: None if isinstance(value, int) else str(value)[:40],
)
def test_refuses_in_one_line_and_goes_on(service, body, status, message):
    code, line = service.refused(PATH, body)
    assert code == status and message in line
    assert service.text(prompt="T", max_tokens=1, seed=0)


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/v1/chat/completions", "POST", 404), ("/../../etc/passwd", "GET", 404), (PATH, "GET", 405), ("/", "PUT", 405)],
)
def test_refuses_other_addresses(service, path, method, status):
    code, line = service.refused(path, b"{}", method=method)
    assert code == status and path in line


def test_health_models_metrics_and_page(service):
    assert service.json("/health") == {"status": "ok", "id": "gpt/a", "kind": "texts", "active": 0, "waiting": 0}
    (model,) = service.json("/v1/models")["data"]
    assert model["id"] == "gpt/a" and model["context"] == 64 and model["object"] == "model"
    _, headers, page = service.ask("/")
    assert (
        headers["content-type"].startswith("text/html") and "default-src 'self'" in headers["content-security-policy"]
    )
    assert b"http:" not in page and b"https:" not in page and b"//cdn" not in page  # nothing from elsewhere
    before = metrics(service)
    service.text(prompt="The ", max_tokens=7, seed=0)
    after = metrics(service)

    def rise(name):
        return after[name] - before.get(name, 0)

    assert rise('functree_tokens_total{kind="written"}') == 7 and rise('functree_tokens_total{kind="prompt"}') == 4
    assert rise('functree_requests_total{path="/v1/completions",status="200"}') == 1
    assert rise("functree_first_token_seconds_count") == 1
    assert not any("passwd" in name or "chat" in name for name in after)  # no label per address that somebody tries
    assert PATH in service.json("/openapi.json")["paths"]


def metrics(service):
    """{name with labels: value}."""
    lines = service.ask("/metrics")[2].decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def state(service):
    return tuple(service.json("/health")[name] for name in ("active", "waiting"))


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_goes_frees_its_slot_and_its_place_in_the_queue(place, stream):
    limits = web.Limits(tokens=10**6, queue=2)
    with running(run=place / "runs/gpt/a", slots=1, limits=limits) as service:
        body = json.dumps({"prompt": "T", "max_tokens": 10**6, "stream": stream})
        connections = [service.connect() for _ in range(2)]
        for number, connection in enumerate(connections):
            connection.request("POST", PATH, body)
            wait_for(lambda number=number: state(service) == (1, number))
        for number, connection in reversed(list(enumerate(connections))):
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            wait_for(lambda number=number: state(service) == (min(number, 1), max(number - 1, 0)))
        assert service.text(prompt="T", max_tokens=3, seed=0)


def test_full_queue_and_time_out(place):
    limits = web.Limits(tokens=10**6, queue=1, timeout=0.5)
    with running(run=place / "runs/gpt/a", slots=1, limits=limits) as service:
        out = {}

        def ask(name, stream):
            out[name] = service.ask(PATH, {"prompt": "T", "max_tokens": 10**6, "stream": stream})

        threads = []
        for number, stream in enumerate((True, False)):
            threads.append(threading.Thread(target=ask, args=(number, stream)))
            threads[-1].start()
            wait_for(lambda number=number: state(service) == (1, number))
        status, line = service.refused(PATH, {"prompt": "T"})
        assert status == 429 and line == "1 requests are waiting already; try again later"
        for thread in threads:
            thread.join()
        late = "the answer took longer than 0.5 s"
        *parts, last = events(out[0][2])  # that of a text that has begun comes as an event
        assert out[0][0] == 200 and parts and last["error"]["message"] == late
        assert out[1][0] == 504 and json.loads(out[1][2])["error"]["message"] == late
        assert service.text(prompt="T", max_tokens=3, seed=0)


def test_body_that_is_too_slow_or_grows_too_large(place):
    limits = web.Limits(timeout=0.3, megabytes=0.1)
    with running(run=place / "runs/gpt/a", slots=1, limits=limits) as service:
        for head, body, status in (
            ("Content-Length: 50", b"{", b"408"),
            ("Transfer-Encoding: chunked", b"20000\r\n" + b"a" * 0x20000 + b"\r\n0\r\n\r\n", b"413"),
            ("Content-Length: 999999\r\nExpect: 100-continue", b"", b"413"),
        ):
            with socket.create_connection(("127.0.0.1", service.port)) as client:
                client.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body)
                assert client.recv(4096).startswith(b"HTTP/1.1 " + status)
        assert service.text(prompt="T", max_tokens=3, seed=0)


def test_error_of_the_engine_is_an_answer_and_the_next_text_is_written(service, monkeypatch):
    engine = service.app.state.engine

    def broken(*args, **options):
        raise RuntimeError("out of\nmemory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.batch, "decode", broken)
        assert service.refused(PATH, {"prompt": "T"}) == (500, "out of memory")
    assert service.text(prompt="T", max_tokens=3, seed=0) and state(service) == (0, 0)


class Bytes:
    """A writer whose tokens are bytes: most characters take several."""

    published = False
    ends = forbidden = ()

    class tokenizer:
        @staticmethod
        def decode(ids):
            return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("size", [1, 2, 5])
def test_pieces_join_to_the_text_and_hold_no_half_character(size):
    text = "naïve Ünïcode, 你好, 🙂🙂 stop here and there"
    ids = list(text.encode())
    pieces = Pieces(Bytes, list("é".encode()), ())
    out = [pieces.push(ids[i : i + size], i + size >= len(ids)) for i in range(0, len(ids), size)]
    assert "".join(out) == text and not any("\ufffd" in piece for piece in out)
    pieces, out = Pieces(Bytes, [97], ("stop her", "stop it")), []
    for i in range(0, len(ids), size):
        out.append(pieces.push(ids[i : i + size], i + size >= len(ids)))
        if pieces.stopped:
            break
    assert "".join(out) == text[: text.index("stop")] and pieces.stopped
    assert Pieces(Bytes, [97], ()).push([98, 0xE4], True) == "b\ufffd"  # a text that ends within a character


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "there is no run in 'runs' that can be served"),
        (("--run", "nowhere"), "'nowhere' is not the folder of a run"),
        (("--run", "a", "--weights", "b"), "either --run DIR or --weights SOURCE"),
        (("--net", "resnet18"), "--net goes with --weights"),
        (("--weights", "nowhere"), "nowhere"),
        (("--slots", "0"), "--slots is 0; expected at least 1"),
        (("--timeout", "0"), "--timeout is 0.0; expected a number above 0"),
        (("--port", "70000"), "--port is 70000; expected 0 to 65535"),
        (("--host", "no.such.host.invalid"), "cannot listen at --host no.such.host.invalid"),
        (("--device", "abacus"), "--device 'abacus' cannot be used"),
    ],
    ids=runs.flag_id,
)
def test_refuses_flags(argv, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    # An unreachable hub is asked for 24 seconds, with a line for each time.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert message in runs.refused("serve", capfd, *argv)


def test_refuses_what_does_not_fit_the_run(here, capfd):
    run = ("--run", "runs/gpt/a")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = runs.refused("serve", capfd, *run, "--port", taken.getsockname()[1])
        assert "cannot listen at --host 127.0.0.1 --port" in line and "in use" in line
    assert "--context is 65; expected up to the net's 64" in runs.refused("serve", capfd, *run, "--context", 65)
    assert "--compile needs --exact" in runs.refused("serve", capfd, *run, "--compile")
    assert "99" in runs.refused("serve", capfd, *run, "--checkpoint", "99")
