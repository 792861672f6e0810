"""Class folders of image files: the listing, decoding in worker processes, and files that are odd or bad."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core import random
from tests import processes
from train.data import DataError
from train.data.batching import epoch_batch
from train.data.images import arrays, augment
from train.data.images import picture as pictures
from train.data.images.files import Decoder, listing
from train.data.images.rectangles import rectangles

ROOT = Path(__file__).parents[4]
KEY = random.key(3)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth, as photographs are: what JPEG and scaling do to noise says little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve pictures of three classes, all of different sizes, JPEG and PNG."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        image = picture(60 + 7 * number, 110 - 5 * number, number)
        save(folder / f"class{number % 3}" / f"{number:02}.{'png' if number % 4 else 'jpg'}", image)
    return folder


@pytest.fixture(scope="module")
def files(folder):
    return listing(folder)


@pytest.fixture(scope="module")
def decoders():
    """By the number of workers."""
    with Decoder(0) as none, Decoder(1, ahead=1) as one, Decoder(2, ahead=3) as two:
        yield [none, one, two]


@pytest.fixture(scope="module")
def functional():
    return pytest.importorskip("torchvision.transforms.functional", reason="torchvision is not installed")


def assert_same(actual, expected):
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected) > 0
    for (pixels, labels), (squares, targets) in zip(actual, expected, strict=True):
        assert pixels.dtype == torch.uint8 and labels.dtype == torch.int64 and pixels.is_contiguous()
        assert torch.equal(pixels, squares) and torch.equal(labels, targets)


# The listing.


def test_listing(tmp_path):
    for name in ("b/2.png", "b/1.JPG", "a/deep/3.bmp", "a/.hidden.png", "a/.cache/4.png", ".git/5.png"):
        save(tmp_path / name, picture(4, 4), format="PNG")
    (tmp_path / "a" / "notes.txt").write_text("ignored")
    (tmp_path / "empty").mkdir()
    actual = listing(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in actual.paths] == ["a/deep/3.bmp", "b/1.JPG", "b/2.png"]
    assert actual.classes == ("a", "b") and actual.labels.tolist() == [0, 1, 1]
    assert actual.labels.dtype == torch.int64 and actual.skipped == ((tmp_path / "empty", "has no picture"),)
    actual = listing(tmp_path, ("a", "aa", "b"))
    assert actual.labels.tolist() == [0, 2, 2] and actual.classes == ("a", "aa", "b")
    with pytest.raises(DataError, match=r"/b is none of the 2 classes of the training part"):
        listing(tmp_path, ["a", "empty"])


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: None, "does not exist, expected a folder with one sub-folder per class"),
        (lambda d: d.write_text(""), "is a file, expected a folder"),
        (lambda d: save(d / "1.png", picture(4, 4)), "has no sub-folders, expected one per class"),
        (lambda d: (d / "cat").mkdir(parents=True), "no picture in the sub-folders of"),
    ],
    ids=["missing", "file", "flat", "empty"],
)
def test_folders_that_cannot_be_used(prepare, message, tmp_path):
    prepare(tmp_path / "pictures")
    with pytest.raises(DataError, match=message) as caught:
        listing(tmp_path / "pictures")
    assert "\n" not in str(caught.value)


# Decoding.


@pytest.mark.parametrize("scale", [(0.08, 1.0), None], ids=["crops", "whole"])
def test_batches_are_functions_of_key_and_step(scale, files, decoders):
    def batches(decoder, first=0, key=KEY):
        return list(decoder.train_batches(files, key, range(first, 21), 5, 24, scale=scale))

    expected = batches(decoders[0])
    assert_same(batches(decoders[1]), expected)
    assert_same(batches(decoders[2]), expected)
    assert_same(batches(decoders[2], first=18), expected[18:])
    other = batches(decoders[1], first=20, key=random.key(4))
    assert not torch.equal(other[0][0], expected[20][0])


def test_evaluation_goes_through_all_in_order(files, decoders):
    expected = list(decoders[0].evaluation_batches(files, 5, 24, resize=30))
    assert [len(labels) for _, labels in expected] == [5, 5, 2]
    assert torch.equal(torch.cat([labels for _, labels in expected]), files.labels)
    for decoder in decoders[1:]:
        assert_same(decoder.evaluation_batches(files, 5, 24, resize=30), expected)


def test_iterations_side_by_side_and_abandoned(files, decoders):
    for decoder in decoders:
        training = decoder.train_batches(files, KEY, range(9), 4, 16)
        actual = [next(training) for _ in range(3)]
        evaluation = list(decoder.evaluation_batches(files, 5, 24))
        abandoned = decoder.evaluation_batches(files, 2, 24)
        next(abandoned)
        abandoned.close()
        actual += training
        assert_same(actual, decoders[0].train_batches(files, KEY, range(9), 4, 16))
        assert_same(evaluation, decoders[0].evaluation_batches(files, 5, 24))


def test_crops_are_those_of_torchvision(files, functional):
    order, site = random.sites(KEY, 2)
    with Decoder(0, reduce=False) as decoder:
        actual = list(decoder.train_batches(files, KEY, range(2, 5), 6, 24))
    for step, (pixels, labels) in zip(range(2, 5), actual, strict=True):
        indices = epoch_batch(order, step, 12, 6)
        assert torch.equal(labels, files.labels[indices])
        opened = [Image.open(files.paths[i]).convert("RGB") for i in indices]
        width, height = (torch.tensor(x) for x in zip(*(image.size for image in opened), strict=True))
        boxes, _ = augment.boxes(random.sites(random.fold_in(site, step), 6), height, width)
        for image, box, square in zip(opened, boxes.int().tolist(), pixels, strict=True):
            expected = functional.resized_crop(image, *box, [24, 24])
            assert torch.equal(square, functional.pil_to_tensor(expected))


def test_evaluation_is_that_of_torchvision(files, functional, decoders):
    for channels, mode in ((3, "RGB"), (1, "L")):
        actual = torch.cat([x for x, _ in decoders[0].evaluation_batches(files, 5, 24, channels, resize=29)])
        for path, square in zip(files.paths, actual, strict=True):
            image = functional.center_crop(functional.resize(Image.open(path).convert(mode), 29), 24)
            assert torch.equal(square, functional.pil_to_tensor(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_jpeg_is_decoded_at_a_fraction(orientation, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "a" / "1.jpg", picture(700, 901), quality=95, exif=exif)
    sizes = []
    converted = pictures.converted
    monkeypatch.setattr(pictures, "converted", lambda image, n: sizes.append(image.size) or converted(image, n))

    def batches(reduce):
        actual = Decoder(0, reduce=reduce).train_batches(listing(tmp_path), KEY, range(8), 1, 32, scale=(0.2, 1.0))
        return torch.cat([pixels for pixels, _ in actual]).float()

    whole = batches(reduce=False)
    assert set(sizes) == {(901, 700)}
    sizes.clear()
    reduced = batches(reduce=True)
    assert set(sizes) == {(226, 175), (113, 88)}
    difference = (whole - reduced).abs()
    assert 0 < difference.mean() < 0.5 and difference.max() <= 4


def test_rectangles_of_numpy_and_torch_are_the_same():
    keys = random.split(random.key(0), 20_000)
    height, width = random.randint(random.key(1), (2, 20_000), 1, 900).float()
    for scale, ratio in (((0.08, 1.0), (3 / 4, 4 / 3)), ((0.02, 0.33), (0.3, 3.3))):
        expected, any_fits = augment.boxes(keys, height, width, scale, ratio)
        draws = (x.numpy() for x in augment.rectangle_draws(keys, scale, ratio))
        boxes, fits = rectangles(np, *draws, height.numpy(), width.numpy(), ratio)
        assert boxes.dtype == np.float32
        np.testing.assert_array_equal(boxes, expected)
        np.testing.assert_array_equal(fits, any_fits)


# Odd and bad files.


def test_odd_pictures_are_converted(tmp_path, decoders):
    colour = picture(12, 12)
    grey = colour.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 8
    clear = colour.copy()
    clear.putalpha(grey)
    palette = colour.quantize(16)
    odd = [
        save(tmp_path / "a" / "grey.png", grey),
        save(tmp_path / "a" / "clear.png", clear),
        save(tmp_path / "a" / "grey_clear.png", clear.convert("LA")),
        save(tmp_path / "a" / "palette.gif", palette, transparency=3),
        save(tmp_path / "a" / "cmyk.jpg", colour.convert("CMYK")),
        save(tmp_path / "a" / "16bit.png", Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)),
        save(tmp_path / "a" / "black_and_white.png", colour.convert("1")),
        save(tmp_path / "a" / "upright.jpg", colour, exif=exif, quality=100, subsampling=0),
    ]
    files = listing(tmp_path)
    for channels in (1, 3):
        [(actual, _)] = decoders[2].evaluation_batches(files, 99, 12, channels)
        for path, square in zip(files.paths, actual, strict=True):
            torch.testing.assert_close(square / 255, arrays.read_image(path, channels=channels), rtol=0, atol=1e-6)
    assert sorted(odd) == list(files.paths) and not decoders[2].skipped
    named = dict(zip([path.stem for path in files.paths], actual, strict=True))
    assert torch.equal(named["16bit"], named["grey"])
    expected = torch.from_numpy(np.array(colour.transpose(Image.Transpose.ROTATE_90))).permute(2, 0, 1).int()
    assert (named["upright"].int() - expected).abs().float().mean() < 3


def write_bad(folder: Path) -> list[Path]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8))
    bad = [folder / "b" / name for name in ("empty.jpg", "text.png", "half.jpg", "half.png", "huge.png", "gone.png")]
    save(bad[2], noise)
    save(bad[3], noise)
    save(bad[4], Image.new("1", (10_000, 10_000)))
    bad[0].touch()
    bad[1].write_text("this is not a picture")
    os.truncate(bad[2], 1500)
    os.truncate(bad[3], 1500)
    bad[5].symlink_to("nowhere")
    return sorted(bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_skipped_and_counted(workers, tmp_path, caplog):
    good = [save(tmp_path / name, picture(20, 20, i)) for i, name in enumerate(["a/1.png", "c/1.png", "c/2.png"])]
    bad = write_bad(tmp_path)
    files = listing(tmp_path)
    assert files.paths == (good[0], *bad, *good[1:])
    with Decoder(workers) as decoder:
        evaluated = list(decoder.evaluation_batches(files, 3, 16))
        assert [labels.tolist() for _, labels in evaluated] == [[0], [2, 2]]  # the batch in the middle is all bad
        assert [path for path, _ in decoder.skipped] == bad
        assert [record.getMessage() for record in caplog.records] == [f"skipped: {why}" for _, why in decoder.skipped]
        assert all(str(path) in why and "\n" not in why for path, why in decoder.skipped)
        after = list(decoder.train_batches(files, KEY, range(6), 4, 16, scale=None))
        assert len(caplog.records) == 6
        assert_same(decoder.evaluation_batches(files, 3, 16), evaluated)
    with Decoder(workers) as decoder:
        # The same, whether or not they are known to be bad beforehand.
        assert_same(decoder.train_batches(files, KEY, range(6), 4, 16, scale=None), after)
        assert {path for path, _ in decoder.skipped} == set(bad)
    order, _ = random.sites(KEY, 2)
    following = [0, 7, 7, 7, 7, 7, 7, 7, 8]
    expected = [following[i] for step in range(6) for i in epoch_batch(order, step, 9, 4).tolist()]
    squares = dict(zip([0, 7, 8], torch.cat([x for x, _ in evaluated]), strict=True))
    assert torch.equal(torch.cat([x for x, _ in after]), torch.stack([squares[i] for i in expected]))
    assert torch.equal(torch.cat([labels for _, labels in after]), files.labels[expected])


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_files(workers, tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(3):
        (tmp_path / "a" / f"{number}.jpg").write_text("no")
    files = listing(tmp_path)
    with Decoder(workers) as decoder:
        with pytest.raises(DataError, match="none of the 3 pictures can be read; .*/0.jpg cannot be read as a picture"):
            next(decoder.train_batches(files, KEY, range(1), 2, 16))
        with pytest.raises(DataError, match="none of the 3 pictures can be read"):
            list(decoder.evaluation_batches(files, 2, 16))


def test_a_narrow_strip_is_bad(tmp_path):
    save(tmp_path / "a" / "1.png", Image.new("L", (60_000, 1)))
    with pytest.raises(DataError, match="60000x1 pixels are too narrow a strip"):
        list(Decoder(0).evaluation_batches(listing(tmp_path), 1, 224))


# Faults.


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda d, files: Decoder(-1), "has -1 workers"),
        (lambda d, files: d.evaluation_batches(files, 2, 24, channels=4), "channels is 4, expected 1 or 3"),
        (lambda d, files: d.evaluation_batches(files, 2, 24, resize=20), "cannot cut 24 pixels out of .* to 20"),
        (lambda d, files: next(d.evaluation_batches(files, 0, 24)), "cannot make batches of 0"),
        (lambda d, files: next(d.train_batches(files, KEY, range(1), 13, 24)), "batches of 13 from 12 examples"),
    ],
)
def test_what_is_refused(use, message, files, decoders):
    with pytest.raises(DataError, match=message):
        use(decoders[0], files)


def test_a_killed_worker_is_named(files):
    with Decoder(2) as decoder:
        batches = decoder.train_batches(files, KEY, range(100), 4, 16)
        next(batches)
        processes = decoder._pool._processes
        processes[1].kill()
        with pytest.raises(DataError, match="decoding worker 2 of 2 was ended by SIGKILL$"):
            list(batches)
        assert [process.returncode for process in processes] == [0, -signal.SIGKILL]
        with pytest.raises(DataError, match="the decoder is closed"):
            next(decoder.evaluation_batches(files, 2, 24))


def test_closing_leaves_nothing_behind(files):
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    decoder = Decoder(2)
    batches = decoder.train_batches(files, KEY, range(100), 4, 16)
    next(batches)
    processes = decoder._pool._processes
    decoder.close()
    decoder.close()
    assert [process.returncode for process in processes] == [0, 0]
    with pytest.raises(DataError, match="the decoder is closed"):
        list(batches)
    if before:
        assert set(os.listdir("/proc/self/fd")) == before


SCRIPT = """
import sys
from core import random
from train.data.images.files import Decoder, listing
try:
    decoder = Decoder(2)
    print(*[process.pid for process in decoder._pool._processes], flush=True)
    files = listing(sys.argv[1])
    for images, labels in decoder.train_batches(files, random.key(0), range(10**6), 12, 64):
        print("batch", flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc to see which processes there are")
@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGKILL"])
def test_workers_end_with_the_process(signal_name, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with processes.start(command, env=environment, **pipes) as process:
        workers = [Path("/proc") / pid for pid in process.stdout.readline().split()]
        assert process.stdout.readline() == "batch\n" and len(workers) == 2 and all(w.exists() for w in workers)
        os.killpg(process.pid, getattr(signal, signal_name))  # as the terminal does
        _, errors = process.communicate(timeout=20)
    assert errors == "" and process.returncode == (130 if signal_name == "SIGINT" else -signal.SIGKILL)
    until = time.monotonic() + 10
    while any(map(running, workers)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(running, workers))


def running(process: Path) -> bool:
    """Not that it has ended and whoever takes care of orphans has not looked yet."""
    try:
        return process.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
