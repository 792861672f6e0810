"""superres.py: the protocol, tiles, files of many kinds, SRGAN; the default's figures."""

import dataclasses
import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core import random, spec, tree
from experiments import superres
from experiments.parts import upscaled_files, upscaler, upscaler_training
from experiments.parts.upscaler import Upscaler
from nets.superresolution import by_name, drcn
from tests.experiments import runs
from tests.nets.superresolution import modules
from tests.nets.superresolution.test_by_name import SMALL, values_of
from tests.real_pictures import needs_pictures, unpacked
from tests.registry.experiments import pictures as rows
from train.data.images import full_range, originals, resize
from train.data.images.full_range import FullRange
from train.run import open_run

call = functools.partial(runs.call, "superres")
SOURCES = ("--data", "high", "--test", "low")
QUICK = ("--batch", "2", "--steps", "2", "--no-compile")
RUN = Path("runs/superres/a")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """high/ and low/ with pictures; runs a (fsrcnn-s x2), b (vdsr x2 and x3) and c (srresnet-small x2)."""
    folder = tmp_path_factory.mktemp("superres")
    rows.pictures(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        size = ("--patch", "24")
        assert call(*SOURCES, *QUICK, *size, "--net", "fsrcnn-s", "--scale", "2", "--name", "a") == 0
        assert call(*SOURCES, *QUICK, *size, "--net", "srcnn", "--scale", "2", "3", "--name", "b") == 0
        assert call(*SOURCES, *QUICK, "--patch", "48", "--net", "srresnet-small", "--scale", "2", "--name", "c") == 0
    return folder


def kind(path):
    with Image.open(path) as image:
        return image.mode, image.size


def small_model(name):
    """A net with moved initial values, and one of its scales."""
    net, cfg = SMALL[name]
    scale = (by_name.scales_of(net, cfg) or (3,))[-1]
    return Upscaler(name, net, cfg, values_of(net, cfg), (scale,), residual=net is not drcn), scale


@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_tiles_equal_the_whole_picture(name, ensemble):
    model, scale = small_model(name)
    if ensemble and name not in ("fsrcnn x2", "vdsr"):
        pytest.skip("the same for all nets")
    x = random.uniform(random.key(3), (1, 3, 41, 34), torch.float64)
    whole = upscaler.enlarge(model, x, scale, ensemble)
    side = 2 * model.overlap(scale) + 9
    torch.testing.assert_close(upscaler.by_tiles(model, x, scale, side, ensemble), whole, rtol=0, atol=1e-9)
    single = dataclasses.replace(model.cfg) == model.cfg and whole.abs().max() > 0.1
    assert single and whole.shape == (1, 3, 41 * scale, 34 * scale)


def test_tiles_equal_the_whole_picture_in_single_precision():
    for preset in ("fsrcnn", "espcn", "edsr-small"):
        net, cfg = by_name.configured(preset, (3,))
        model = Upscaler(preset, net, cfg, spec.init(random.key(0), net.spec(cfg)), (3,), True)
        x = random.uniform(random.key(3), (1, 3, 70, 90))
        whole = upscaler.enlarge(model, x, 3)
        tiles = upscaler.by_tiles(model, x, 3, 2 * model.overlap(3) + 20)
        torch.testing.assert_close(tiles, whole, rtol=0, atol=1e-6)


def test_windows_cover_a_picture_once():
    for height, width, tile, overlap in ((10, 7, 5, 1), (9, 9, 100, 3), (23, 8, 9, 4)):
        count = torch.zeros(height, width)
        for outer, inner in upscaler.windows(height, width, tile, overlap):
            inner.of(count)[:] += 1
            assert max(outer.bottom - outer.top, outer.right - outer.left) <= tile
            assert min(inner.top - outer.top, overlap) == min(inner.top, overlap)
        assert (count == 1).all()
    with pytest.raises(ValueError, match="--tile is 8; expected at least 9: 4 pixels a side only decide on others"):
        next(upscaler.windows(10, 10, 8, 4))


def test_memory_is_that_of_a_tile(monkeypatch):
    """The net sees tiles alone, and of a large picture many."""
    model, scale = small_model("fsrcnn x2")
    sizes, apply = [], model.net.apply
    monkeypatch.setattr(model.net, "apply", lambda p, x, *a, **k: sizes.append(x.shape) or apply(p, x, *a, **k))
    picture = FullRange(np.zeros((150, 120, 3), np.uint8), 255.0)
    upscaled_files.enlarged(model._replace(values=tree.cast(model.values, torch.float32)), picture, scale, 40)
    assert len(sizes) > 9 and max(max(size[2:]) for size in sizes) == 40


def test_ensemble_is_the_mean_over_symmetries():
    model, scale = small_model("espcn")
    x = random.uniform(random.key(3), (1, 1, 6, 5), torch.float64)
    single = [upscaler.luminance_or_colour(model, torch.rot90(x, k, (2, 3)), scale) for k in range(4)]
    single += [upscaler.luminance_or_colour(model, torch.rot90(x, k, (2, 3)).flip(3), scale).flip(3) for k in range(4)]
    expected = torch.stack([torch.rot90(y, -(i % 4), (2, 3)) for i, y in enumerate(single)]).mean(0)
    torch.testing.assert_close(upscaler.luminance_or_colour(model, x, scale, ensemble=True), expected)


class Nothing:
    """A net that adds nothing to the bicubic enlargement."""

    ENLARGED = False

    @staticmethod
    def apply(params, x, cfg, *, train=False):
        return torch.zeros(())

    @staticmethod
    def reach(cfg):
        return 0


@dataclasses.dataclass(frozen=True)
class NothingConfig:
    channels: int
    scale: int = 3


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_keep_their_range_greys_and_alpha(channels):
    """With a net that adds nothing, each is its bicubic enlargement, in its own range."""
    model = Upscaler("nothing", Nothing, NothingConfig(channels), {"w": torch.zeros(1)}, (3,), True)
    values = np.random.default_rng(0).random((12, 11, 4)).astype(np.float32)
    for white, dtype, kept in (
        (255.0, np.uint8, 4),
        (255.0, np.uint8, 2),
        (65535.0, np.uint16, 1),
        (4.0, np.float32, 1),
    ):
        pixels = (values[..., :kept] * white).astype(dtype)
        out = upscaled_files.enlarged(model, FullRange(pixels, white, b"profile"), 3, 9)
        x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
        expected = resize.enlarged(x, 3).clamp(0, white)[0].permute(1, 2, 0).numpy()
        assert out.pixels.dtype == dtype and out.white == white and out.profile == b"profile"
        np.testing.assert_allclose(out.pixels, expected, rtol=0, atol=0.53 if dtype != np.float32 else 1e-5)


@pytest.mark.parametrize("name", ["fsrcnn x2", "edsr x2"])
def test_grey_pictures_are_as_those_of_equal_colours(name):
    model, scale = small_model(name)
    x = random.uniform(random.key(3), (1, 1, 9, 8), torch.float64)
    grey, colour = upscaler.enlarge(model, x, scale), upscaler.enlarge(model, x.expand(-1, 3, -1, -1), scale)
    torch.testing.assert_close(grey, colour.mean(1, keepdim=True))


def test_files(here, capsys):
    """Several kinds, one of them broken, some of one name; beside the run, in a folder that is new each time."""
    inputs = here / "inputs"
    (inputs / "more").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 4), np.uint8)
    Image.fromarray(noise).save(inputs / "a.png")
    Image.fromarray(noise[..., 0]).save(inputs / "more" / "a.png")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(inputs / "deep.png")
    Image.fromarray(noise[..., 0] / np.float32(255)).save(inputs / "float.tiff")
    Image.fromarray(noise[..., 0].astype(np.float32)).save(inputs / "wrong.tiff")
    (inputs / "broken.png").write_bytes(b"no picture")
    assert call("upscale", "--run", RUN, "inputs", "--tile", "20") == 0
    out = capsys.readouterr().out
    assert "4 pictures enlarged, 2 skipped; files in runs/superres/a/upscaled/" in out
    assert "skipped: inputs/broken.png cannot be read as a picture: its format is unknown" in out
    assert "wrong.tiff cannot be read as a picture: its floating-point values go from" in out
    modes = {path.name: kind(path)[0] for path in (RUN / "upscaled").iterdir()}
    assert modes == {"a.png": "RGBA", "a_2.png": "L", "deep.png": "I;16", "float.tiff": "F"}
    assert all(kind(path)[1] == (24, 18) for path in (RUN / "upscaled").iterdir())
    assert call("upscale", "--run", RUN, "inputs/wrong.tiff", "--white", "255", "--self-ensemble") == 0
    assert [path.name for path in (RUN / "upscaled_2").iterdir()] == ["wrong.tiff"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["upscale", "--run", "runs/superres/a", "low", "--tile", "10"], "--tile is 10; expected at least"),
        (
            ["upscale", "--run", "runs/superres/a", "low", "--scale", "3"],
            "--scale is 3; the net has learned to enlarge by 2",
        ),
        (["upscale", "--run", "runs/superres/b", "low"], "the net enlarges by 2, 3; expected one of them as --scale"),
        (["upscale", "--run", "runs/superres/a", "nowhere.png"], "nowhere.png does not exist"),
        (
            ["upscale", "--run", "runs/superres/a", "broken.png"],
            "none of the 1 pictures can be used; broken.png cannot",
        ),
        (
            ["upscale", "--run", "runs/superres/a", "low", "--out", "high"],
            "'high' exists already; choose another --out",
        ),
        (["upscale", "--weights", "fsrcnn.pth", "low"], "--weights 'fsrcnn.pth' needs --net and --scale"),
        (["upscale", "low"], "expected either --run DIR or --weights SOURCE"),
        (["upscale", "low", "--weights", "broken.png", "--net", "drcn", "--scale", "2"], "no public drcn is known"),
        (["evaluate", "--run", "runs/superres/a", "--test", "nowhere"], "'nowhere' does not exist"),
        (
            ["--net", "fsrcnn", "--scale", "2", "--weights", "runs/superres/a", *SOURCES, "--patch", "24"],
            "--weights: the net there is Config(scale=2, width=32, shrunk=5, mappings=1, channels=1), expected Config(",
        ),
    ],
    ids=runs.flag_id,
)
def test_refusals(here, capfd, argv, message):
    (here / "broken.png").write_bytes(b"no picture")
    assert message in runs.refused("superres", capfd, *argv)


def test_several_scales_have_their_own_figures_and_pictures(here, capsys):
    result = runs.result(Path("runs/superres/b"))
    assert {f"{m}_{x}" for m in ("psnr", "ssim", "psnr_bicubic", "ssim_bicubic") for x in ("x2", "x3")} <= result.keys()
    assert call("evaluate", "--run", "runs/superres/b", "--scale", "3", "--test", "high") == 0
    out = capsys.readouterr().out
    assert out.index("bicubic        x3  PSNR") < out.index("srcnn          x3  PSNR")
    folder = Path("runs/superres/b/evaluations/high")
    assert sorted(path.name for path in folder.iterdir()) == ["bars_x3.png", "crops_x3.png", "result.json"]


def test_published_weights(here, capsys):
    """A file in the names of a public version: figures are those of the net itself, without the bicubic enlargement."""
    torch.manual_seed(0)
    module = modules.Fsrcnn(2)
    torch.save(module.state_dict(), "fsrcnn_x2.pth")
    flags = ("--weights", "fsrcnn_x2.pth", "--net", "fsrcnn", "--scale", "2")
    assert call("evaluate", *flags, "--test", "low") == 0
    assert call("upscale", *flags, "low/0.png") == 0
    picture = full_range.read("low/0.png").pixels.transpose(2, 0, 1)[None] / np.float32(255)
    ycbcr = resize.ycbcr(torch.from_numpy(picture))
    with torch.no_grad():
        large = torch.cat([module(ycbcr[:, :1]), resize.enlarged(ycbcr[:, 1:], 2)], 1)
    expected = upscaler.rounded(resize.rgb(large))[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(full_range.read("upscaled/0.png").pixels, expected, atol=1)
    assert runs.result(Path("evaluations/low"))["psnr_x2"] < 30


def test_srgan_from_a_run_of_srresnet(here, capsys):
    flags = ("--net", "srgan-small", "--scale", "2", "--weights", "runs/superres/c", *SOURCES, *QUICK)
    assert call(*flags, "--patch", "32", "--name", "g", "--learning-rate", "1e-9") == 0
    result, start = runs.result(Path("runs/superres/g")), runs.result(Path("runs/superres/c"))
    assert abs(result["psnr_x2"] - start["psnr_x2"]) < 0.5  # two steps of next to nothing; the norms' statistics move
    names = set().union(*runs.metrics(Path("runs/superres/g")))
    assert {"critic/loss", "generator/content", "generator/adversarial", "critic/real", "critic/fake"} <= names
    assert call("upscale", "--run", "runs/superres/g", "low/0.png") == 0
    assert kind("runs/superres/g/upscaled/0.png") == ("RGB", (80, 88))
    shutil.rmtree("runs/superres/g/checkpoints/2")
    assert call("evaluate", "--run", "runs/superres/g", "--test", "low") == 2


def test_start_from_a_run_of_another_scale(here, capsys):
    """EDSR's and FSRCNN's papers do so: all but the layers that enlarge are taken over."""
    flags = ("--net", "srresnet-small", "--scale", "3", "--weights", "runs/superres/c", *SOURCES)
    assert call(*flags, *QUICK, "--patch", "24", "--learning-rate", "1e-9", "--name", "s") == 0
    out = capsys.readouterr().out
    assert "of other shapes, and so drawn anew: 'up.0.conv.bias', 'up.0.conv.weight'" in out
    model, before = (upscaler.load(open_run(Path(f"runs/superres/{n}"), superres.RUNS)).values for n in "sc")
    torch.testing.assert_close(model["head"], before["head"], rtol=0, atol=1e-6)
    assert model["up"][0]["conv"]["bias"].shape == (9 * 32,)


def test_content_loss_on_features_of_a_classifier(here, monkeypatch):
    """A VGG of classify.py: the last feature maps of a stage, normalised as it has learned, divided by 12.75."""
    from experiments.parts import classifier as classifiers
    from nets.classifiers import vgg

    cfg = vgg.Config(((3,), (4, 5)), pooled=1, hidden=4, classes=2)
    values = spec.init(random.key(0), vgg.spec(cfg))
    trained = classifiers.Trained("vgg11", 3, 8, 8, ("a", "b"), (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    monkeypatch.setattr(classifiers, "is_run", lambda folder: True)
    monkeypatch.setattr(classifiers, "load", lambda folder: (trained, values))
    monkeypatch.setattr(classifiers, "net_of", lambda trained: (vgg, cfg))
    x = random.uniform(random.key(1), (2, 3, 8, 8))
    phi = upscaler_training.content(here, 2, torch.device("cpu"))
    expected = vgg.feature_maps(values, (x - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 0.5, cfg)[1] / 12.75
    torch.testing.assert_close(phi(x), expected)
    assert phi(x).shape == (2, 5, 4, 4)
    with pytest.raises(ValueError, match="--content-stage is 3; vgg11 has 2 stages"):
        upscaler_training.content(here, 3, torch.device("cpu"))
    monkeypatch.setattr(classifiers, "net_of", lambda trained: (by_name.PRESETS["edsr"], cfg))
    with pytest.raises(ValueError, match="is a vgg11 of 3 channels; expected a VGG of 3"):
        upscaler_training.content(here, 2, torch.device("cpu"))


def test_loss_of_drcn_goes_from_all_predictions_to_their_average():
    cfg = drcn.Config(recursions=3, width=4)
    values, keys = values_of(drcn, cfg), random.split(random.key(0), 2)
    x, high = (random.uniform(key, (2, 1, 16, 16), torch.float64) for key in keys)
    small, loss = torch.zeros(2, 1, 8, 8), upscaler_training.objective(drcn, cfg, "mse", True)
    each = drcn.predictions(values, x, cfg)
    inner = (..., slice(4, -4), slice(4, -4))

    def error(out):
        return (out - high)[inner].square().flatten(1).mean(1)

    single = torch.stack([error(each[:, i]) for i in range(3)]).mean(0)
    for share in (0.0, 0.25, 1.0):
        batch = {"bicubic": x, "high": high, "small": small, "share": torch.full((2,), share)}
        expected = share * single + (1 - share) * error(drcn.averaged(values, each))
        torch.testing.assert_close(loss(values, batch, keys)[0], expected)


def test_adjustable_clipping():
    """Kim et al. 2016: each value of the gradient within limit / rate, then momentum."""
    args = dataclasses.make_dataclass(
        "Args", ["learning_rate", "steps", "clip", "clipping", "optimizer", "weight_decay"]
    )
    optimizer = upscaler_training.optimizer_of(args(0.1, 1, 0.01, "adjustable", "sgd", 0.0))
    params = {"w": torch.tensor([1.0, -2.0, 3.0])}
    state = optimizer.init(params)
    updates, state = optimizer.update({"w": torch.tensor([0.05, -7.0, 0.3])}, state, params)
    torch.testing.assert_close(updates["w"], torch.tensor([-0.005, 0.01, -0.01]))  # -rate * clip(g, limit / rate)


@needs_pictures
def test_set5_is_told_from_other_pictures(here, tmp_path, capfd):
    """`evaluate` stops if the bicubic figures are not those published."""
    folder = unpacked(tmp_path)
    assert call("evaluate", "--run", RUN, "--test", str(folder)) == 0
    assert "bicubic        x2  PSNR 33.66 dB, SSIM 0.9299" in capfd.readouterr().out
    path = folder / "img_003.png"
    with Image.open(path) as image:
        image.resize((200, 200)).save(path)
    assert call("evaluate", "--run", RUN, "--test", str(folder)) == 2
    out, err = capfd.readouterr()
    assert "bicubic PSNR x2 is " in err and "that of Set5 is 33.66: other pictures, pictures that were scaled" in err
    assert "fsrcnn-s" not in out.partition("bicubic ")[2]


@needs_pictures
@pytest.mark.parametrize(("scale", "psnr", "ssim"), [(2, 33.66, 0.9299), (3, 30.39, 0.8682), (4, 28.42, 0.8104)])
def test_bicubic_figures_of_set5_are_the_published_ones(tmp_path, scale, psnr, ssim):
    test = originals.open_originals(str(unpacked(tmp_path)), 3, 32)
    figures = upscaler.means(upscaler.bicubic_figures(test, scale))
    assert abs(figures[0] - psnr) < 0.01 and abs(figures[1] - ssim) < 1e-4
    model = Upscaler("nothing", Nothing, NothingConfig(1, scale), {"w": torch.zeros(1)}, (scale,), True)
    np.testing.assert_allclose(upscaler.means(upscaler.figures(model, test, scale)), figures, atol=0.002)


@pytest.mark.long
def test_default_gains_1_4_dB(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("--name", "a") == 0
    result = runs.result(RUN)
    assert result["psnr_x3"] > result["psnr_bicubic_x3"] + 1.4
