"""experiments/serve.py as a process: signals, large uploads, and its page in a browser."""

import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import threading
from pathlib import Path

import pytest

from tests.experiments import runs
from tests.experiments.gpt_runs import QUICK, TEXT
from tests.experiments.gpt_runs import call as train

for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from tests.experiments.services import Service, events  # noqa: E402

pytestmark = pytest.mark.slow
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with runs of a small GPT and a small classifier."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        assert train(*QUICK, "--steps", "30", "--name", "a") == 0
        flags = ("--net", "lenet-digits", "--batch", "100", "--epochs", "0.2", "--no-compile")
        assert runs.call("classify", *flags, "--name", "a") == 0
    return folder


def start(folder, *argv):
    """(process, service) of the script at a free port."""
    process = runs.start("serve", folder, "--port", "0", *argv)
    for line in process.stdout:
        if match := re.match(r"serving at http://127.0.0.1:(\d+)/ ", line):
            return process, Service(int(match[1]), None)
    raise AssertionError(process.communicate())


@contextlib.contextmanager
def begun(service, tokens):
    """(answer, its first bytes) of a text that is being streamed."""
    with contextlib.closing(service.connect()) as connection:
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "T", "max_tokens": tokens, "stream": True}))
        answer = connection.getresponse()
        yield answer, answer.read(10)


def test_sigterm_lets_texts_end_and_refuses_new_ones(place):
    process, service = start(place, "--run", "runs/gpt/a", "--slots", "2")
    with begun(service, 900) as (answer, begin):
        process.send_signal(signal.SIGTERM)
        *_, last, done = events(begin + answer.read())
    assert done == "data: [DONE]" and last["usage"]["completion_tokens"] == 900
    assert runs.finish(process) == (0, "ended\n", "")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", service.port))


def test_what_does_not_end_in_time_is_cut_off(place):
    process, service = start(place, "--run", "runs/gpt/a", "--tokens", "10000000", "--drain", "1")
    with begun(service, 10**7):
        process.send_signal(signal.SIGINT)
        code, out, err = runs.finish(process)
    assert (code, out) == (0, "ended\n") and "Traceback" not in err


def test_newest_run_is_served_and_a_taken_port_is_refused(place, capfd):
    """The classifier's; an upload of 100 MB is refused while its sender still sends, and takes no memory."""
    process, service = start(place)
    assert service.json("/health")["id"] == "classify/a"
    code, out, err = runs.finish(runs.start("serve", place, "--run", "runs/gpt/a", "--port", service.port))
    assert (code, out) == (2, "") and "in use" in runs.one_error(err)
    before, size, piece = resident(process.pid), 100_000_000, bytes(2**20)
    for head in (f"Content-Length: {size}", "Transfer-Encoding: chunked"):
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(f"POST /v1/predict HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
            frame = b"%x\r\n" % len(piece) if "chunked" in head else b""
            with contextlib.suppress(ConnectionError):  # a slow machine is cut off after some seconds
                for _ in range(size // len(piece)):
                    client.sendall(frame + piece + (b"\r\n" if frame else b""))
                client.sendall(b"0\r\n\r\n" if frame else bytes(size % len(piece)))
                answer = http.client.HTTPResponse(client)
                answer.begin()
                assert answer.status == 413 and b"larger than 10 MB" in answer.read()
        assert service.json("/health")["status"] == "ok"
    assert resident(process.pid) - before < 40_000_000
    process.send_signal(signal.SIGTERM)
    assert runs.finish(process) == (0, "ended\n", "")


def resident(pid):
    """Bytes of memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH")
    with api.sync_playwright() as playwright:
        options = {"executable_path": CHROMIUM, "args": list(FLAGS), "headless": True}
        context = playwright.chromium.launch_persistent_context(tmp_path_factory.mktemp("profile"), **options)
        yield api, context
        context.close()


def opened(browser, service):
    """(page, what it wrote on its console, addresses that it asked for elsewhere)."""
    _, context = browser
    page, problems, elsewhere = context.new_page(), [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    own = (f"http://127.0.0.1:{service.port}/", "blob:", "data:")
    page.on("request", lambda request: request.url.startswith(own) or elsewhere.append(request.url))
    page.goto(own[0])
    return page, problems, elsewhere


def test_page_writes_texts(place, browser):
    process, service = start(place, "--run", "runs/gpt/a", "--tokens", "100000")
    page, problems, elsewhere = opened(browser, service)
    expect = browser[0].expect
    expect(page.locator("#name")).to_have_text("gpt/a")
    for name, value in (("prompt", "The "), ("max_tokens", "60"), ("seed", "3")):
        page.fill(f"#{name}", value)
    page.click("#write")
    expect(page.locator("#state")).to_have_text(
        re.compile("^60 tokens in .* per second; as long as asked for; seed 3$")
    )
    text = service.text(prompt="The ", max_tokens=60, seed=3, temperature=0.8)
    assert page.locator("#text").text_content() == "The " + text
    page.fill("#prompt", "\u4e00")
    page.click("#write")
    expect(page.locator("#state")).to_contain_text("is not among the")
    assert problems and all("400" in line for line in problems)  # the browser's own line about the status
    page.fill("#prompt", "The ")
    page.fill("#max_tokens", "100000")
    page.click("#write")
    expect(page.locator("#text")).to_have_text(re.compile(".{60}", re.DOTALL))
    page.click("#stop")
    expect(page.locator("#state")).to_have_text("stopped; seed 3")
    for _ in range(200):
        if service.json("/health")["active"] == 0:
            break
        threading.Event().wait(0.05)
    assert service.json("/health")["active"] == 0 and not elsewhere
    page.close()


def test_page_shows_the_classes_of_a_dropped_picture(place, browser, tmp_path):
    from PIL import Image

    Image.new("RGB", (30, 20), "red").save(tmp_path / "red <b>.png")
    (tmp_path / "words.png").write_text("no picture")
    process, service = start(place, "--run", "runs/classify/a")
    page, problems, elsewhere = opened(browser, service)
    expect = browser[0].expect
    page.set_input_files("#file", tmp_path / "red <b>.png")
    expect(page.locator("#rows tr")).to_have_count(5)
    expect(page.locator("figcaption")).to_have_text("red <b>.png")  # a name is text
    classes = service.json("/v1/predict", (tmp_path / "red <b>.png").read_bytes())["classes"]
    assert page.locator("#rows tr td:first-child").all_text_contents() == [one["class"] for one in classes]
    data = list((tmp_path / "red <b>.png").read_bytes())
    drop = """data => { const all = new DataTransfer();
        all.items.add(new File([new Uint8Array(data)], "dropped.png", {type: "image/png"}));
        dispatchEvent(new DragEvent("drop", {dataTransfer: all, cancelable: true})) }"""
    page.evaluate(drop, data)
    expect(page.locator("figcaption")).to_have_text("dropped.png")
    expect(page.locator("#rows tr")).to_have_count(5)
    assert not problems
    page.set_input_files("#file", tmp_path / "words.png")
    expect(page.locator("#state")).to_contain_text("its format is unknown")
    expect(page.locator("#rows tr")).to_have_count(0)
    assert not elsewhere
    page.close()
