"""experiments/serve.py: pictures over HTTP, against the files of the scripts that trained their nets."""

import base64
import dataclasses
import io
import json
import struct
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core import random, spec
from experiments.parts import detector, picture_service, web
from nets.dense import fcos
from tests.experiments import runs

for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from tests.experiments.services import running  # noqa: E402

PATH = "/v1/predict"


def picture(height=24, width=20, seed=0, mode="RGB"):
    """The bytes of a PNG of noise."""
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8)).save(file, "PNG")
    return file.getvalue()


def form(data, name="x.png", field="file"):
    """(body, headers) of a form with one file."""
    head = f'--B\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
    return head.encode() + data + b"\r\n--B--\r\n", {"Content-Type": "multipart/form-data; boundary=B"}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side):
    """A PNG of side x side pixels in a few bytes."""
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * 10_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run of a small classifier, and three pictures."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = ("--net", "lenet-digits", "--batch", "100", "--epochs", "0.2", "--no-compile")
        assert runs.call("classify", *flags, "--name", "a") == 0
        for i in range(3):
            Path(f"{i}.png").write_bytes(picture(20 + i, 30 - i, seed=i))
    return folder


@pytest.fixture(scope="module")
def service(place):
    limits = web.Limits(megabytes=3.0, pixels=1_000_000)
    with running(run=place / "runs/classify/a", limits=limits) as service:
        yield service


def test_classes_are_those_of_predict(service, here):
    """Each alone, and 12 at once."""
    names = ["0.png", "1.png", "2.png"]
    assert runs.call("classify", "predict", "--run", "runs/classify/a", "--workers", "0", *names) == 0
    rows = json.loads(Path("predictions/predictions.json").read_text())
    expected = [[{"class": name, "probability": p} for name, p in row["probabilities"].items()] for row in rows]

    def ask(name):
        return service.json(PATH, Path(name).read_bytes())["classes"]

    with ThreadPoolExecutor(12) as pool:
        answers = [*map(ask, names), *pool.map(ask, names * 4)]
    for answer, classes in zip(answers, expected * 5, strict=True):
        assert [one["class"] for one in answer] == [one["class"] for one in classes]
        for one, other in zip(answer, classes, strict=True):  # batches of other sizes round differently
            assert one["probability"] == pytest.approx(other["probability"], rel=1e-4)


@pytest.mark.parametrize("name", ["x.png", "../../../etc/passwd", "C:\\x", "a\x00b", "x" * 5000])
def test_form_is_read_in_memory_whatever_the_name_says(service, here, monkeypatch, name):
    """A file of over 1 MB too, which the parser of forms would move to the disk."""
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda file: pytest.fail("written to the disk"))
    data = picture(700, 700)
    assert len(data) > 2**20
    body, headers = form(data, name)
    before = runs.contents(here)
    status, _, answer = service.ask(PATH, body, headers)
    if status == 200:
        assert json.loads(answer) == service.json(PATH, data)
    else:
        assert status == 400  # a name that no form may have
    assert runs.contents(here) == before


def refusals():
    truncated = picture(64, 64)[:2000]
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file, "EPS")
    dark = io.BytesIO()
    Image.fromarray(np.full((8, 8), 900, np.uint16)).save(dark, "PNG")
    return {
        "empty": (b"", 400, "the picture cannot be read as a picture: it is empty"),
        "text": (b"hello", 400, "its format is unknown; expected one of PNG, JPEG"),
        "pickle": (b"\x80\x04\x95\x0b\x00\x00\x00.", 400, "its format is unknown"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "its format is unknown"),
        "eps": (file.getvalue(), 400, "its format is unknown"),  # which Pillow reads by another program
        "truncated": (truncated, 400, "the picture cannot be read as a picture"),
        "dark": (dark.getvalue(), 400, "its 16-bit values end at 900"),
        "large": (picture(10, 10) + b"\0" * 3_000_000, 413, "the request is larger than 3 MB"),
        "pixels": (bomb(1001), 413, "the picture has 1001 x 1001 pixels; expected up to 1,000,000"),
        "bomb": (bomb(50_000), 400, "the picture cannot be read as a picture"),
    }


@pytest.mark.parametrize("case", refusals())
def test_refuses_in_one_line_and_goes_on(service, case):
    body, status, message = refusals()[case]
    code, line = service.refused(PATH, body)
    assert code == status and message in line, line
    assert len(service.json(PATH, picture())["classes"]) == 5


@pytest.mark.parametrize("form", [b"--B\r\n", b"", b"--B\r\n\r\n\r\n--B--\r\n"])
def test_refuses_broken_forms(service, form):
    assert service.refused(PATH, form, headers={"Content-Type": "multipart/form-data; boundary=B"})[0] == 400
    assert service.refused(PATH, form, headers={"Content-Type": "multipart/form-data"})[0] == 400


def test_a_picture_that_cannot_be_read_leaves_its_neighbours_alone(service):
    """They are in one batch."""
    cut = picture(200, 200)[:9000]

    def ask(i):
        return service.ask(PATH, cut if i % 3 == 0 else picture(seed=i))[0]

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(24))) == [400 if i % 3 == 0 else 200 for i in range(24)]


def test_models(service):
    (model,) = service.json("/v1/models")["data"]
    assert (model["id"], model["kind"], model["classes"]) == ("classify/a", "classes", [str(i) for i in range(10)])
    assert service.refused("/v1/completions", {"prompt": "a"})[0] == 404


def test_published_weights_of_a_classifier(here):
    """A run's net written as a file of torchvision's names is what --weights reads; here a ResNet of random values."""
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    import torch

    torch.manual_seed(0)
    torch.save(models.squeezenet1_1(num_classes=1000).state_dict(), "net.pth")
    with running(weights="net.pth", net="squeezenet1_1") as service:
        (model,) = service.json("/v1/models")["data"]
        assert model["id"] == "net.pth" and len(model["classes"]) == 1000
        assert len(service.json(PATH, picture(300, 280))["classes"]) == 5


# The other kinds, each trained for a few steps.


def trained(script, *flags):
    assert runs.call(script, *flags, "--no-compile", "--name", "a") == 0
    return Path("runs") / script / "a"


@pytest.mark.slow
def test_enlargement_has_the_bits_of_upscale(here):
    run = trained("superres", "--steps", "2", "--batch", "2")
    assert runs.call("superres", "upscale", "--run", run, "0.png") == 0
    with running(run=run) as service:
        answer = service.json(PATH, Path("0.png").read_bytes())
        alone = service.ask(PATH, Path("0.png").read_bytes(), {"Accept": "image/png"})
    data = base64.b64decode(answer.pop("picture").removeprefix("data:image/png;base64,"))
    assert answer == {"scale": 3, "width": 90, "height": 60} and alone[1]["content-type"] == "image/png"
    assert data == alone[2] == (run / "upscaled/0.png").read_bytes()


@pytest.mark.slow
def test_mask_has_the_colours_of_predict(here):
    run = trained("segment", "--steps", "2", "--batch", "2", "--width", "4", "--depth", "2")
    assert runs.call("segment", "predict", "--run", run, "0.png", "1.png") == 0
    with running(run=run) as service:
        for name in ("0", "1"):
            data = Path(f"{name}.png").read_bytes()
            answer = service.json(PATH, data)
            over = np.asarray(Image.open(io.BytesIO(service.ask(PATH, data, {"Accept": "image/png"})[2])))
            assert np.array_equal(over, np.asarray(Image.open(run / f"predicted/{name}_overlay.png")))
            mask = np.asarray(Image.open(run / f"predicted/{name}.png"))
            assert sum(one["share"] for one in answer["classes"]) == pytest.approx(1)
            assert answer["classes"][0]["share"] == pytest.approx(np.bincount(mask.ravel()).max() / mask.size)


def test_boxes_are_those_of_predict(here, monkeypatch):
    """A net of random values, whose scores are low."""
    cfg = dataclasses.replace(fcos.PRESETS["small"], classes=3)
    params = spec.init(random.key(0), fcos.spec(cfg))
    model = detector.Detector("fcos", params, cfg, ("a", "b", "c"), 64)
    monkeypatch.setattr(picture_service, "SCORE", 0.001)
    paths = [Path(f"{i}.png") for i in range(3)]
    detector.write_predictions(Path("boxes"), model, paths, 0.001)
    answers = picture_service.of_detector(model).answer([path.read_bytes() for path in paths])
    records = json.loads(Path("boxes/boxes.json").read_text())
    assert [answer["objects"] for answer in answers] == [record["objects"] for record in records]
    assert all(record["objects"] for record in records)
