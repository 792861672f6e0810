import numpy as np
import pytest
import torch
from PIL import Image

from core import random
from train import plots
from train.data.points import mixtures
from train.plots import gan as gan_plots

MIXTURE = mixtures.standardised(mixtures.ring())
REAL, _ = mixtures.sample(MIXTURE, random.key(0), 200)
FAKE = 0.5 * random.normal(random.key(1), (100, 2))


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def blue(picture: np.ndarray) -> np.ndarray:
    """The places (count, 2) of the real points' colour, on whatever ground."""
    return np.argwhere(picture[..., 2] - picture[..., 0] > 60)


def orange(picture: np.ndarray) -> np.ndarray:
    return np.argwhere(picture[..., 0] - picture[..., 2] > 60)


def to_the_right(x):
    return 3 * x[:, 0]


def gradient_of(critic):
    return torch.func.grad(lambda x: critic(x).sum())


def test_critic_and_its_arrows(tmp_path):
    """The score rises to the right: so does the grey, and an arrow is drawn from each point to its right."""
    fake = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    for name, gradient in (("with", gradient_of(to_the_right)), ("without", None)):
        gan_plots.critic_plane(tmp_path / f"{name}.png", to_the_right, REAL, fake, "plane", gradient)
    actual, plain = pixels(tmp_path / "with.png"), pixels(tmp_path / "without.png")
    assert len(blue(plain)) > 100 and len(orange(plain)) > 20
    height, width, _ = plain.shape
    row = plain[height // 2]
    assert row[width // 5].mean() > row[width // 2 - 20].mean() > row[2 * width // 3].mean()
    changed = np.argwhere(np.abs(actual - plain).max(-1) > 60)
    assert len(changed) > 60
    low, high = changed.min(0), changed.max(0)
    assert high[1] - low[1] > 60 and high[0] - low[0] > 60  # two arrows, in two places
    leftmost = orange(plain)[:, 1].min()
    assert leftmost <= low[1] <= leftmost + 10  # an arrow starts at its point and goes to the right


@pytest.mark.parametrize(
    "critic", [lambda x: torch.zeros(len(x)), lambda x: torch.where(x[:, 0] > 0, x[:, 1], torch.nan)]
)
def test_a_dead_and_a_partly_broken_critic_are_drawn(critic, tmp_path):
    fake = torch.cat([FAKE, torch.full((3, 2), torch.nan), torch.full((3, 2), 1e4)])
    gan_plots.critic_plane(tmp_path / "c.png", critic, REAL, fake, gradient=gradient_of(critic))
    assert len(blue(pixels(tmp_path / "c.png"))) > 100


def test_pictures_side_by_side(tmp_path):
    with plots.panels(tmp_path / "p.png", 1, 2) as (left, right):
        gan_plots.critic_plane(left, to_the_right, REAL, FAKE)
        gan_plots.points(right, REAL, FAKE, "points")
    actual = pixels(tmp_path / "p.png")
    for half in np.array_split(actual, 2, axis=1):
        assert len(blue(half)) > 60 and len(orange(half)) > 200


def test_points_show_one_place_whatever_is_generated(tmp_path):
    """Points that fly away do not change what is shown."""
    gan_plots.points(tmp_path / "near.png", REAL, FAKE[:1])
    gan_plots.points(tmp_path / "far.png", REAL, 1000 + FAKE[:1])
    near, far = pixels(tmp_path / "near.png"), pixels(tmp_path / "far.png")
    assert near.shape == far.shape and np.abs(near - far).max(-1).astype(bool).mean() < 0.002


@pytest.mark.parametrize("channels", [1, 3])
def test_table_puts_images_in_their_places(channels, tmp_path):
    images = torch.zeros(2, 3, channels, 8, 8)
    images[1, 2] = 1
    rows, columns = ["the first row", "2"], ["a", "a long title of a column", "c"]
    gan_plots.image_table(tmp_path / "t.png", images, rows, columns, title="a title")
    gan_plots.image_table(tmp_path / "bare.png", images)
    actual, bare = pixels(tmp_path / "t.png"), pixels(tmp_path / "bare.png")
    height, width, _ = bare.shape
    cells = [bare[height * (2 * r + 1) // 4, width * (2 * c + 1) // 6].mean() for r in range(2) for c in range(3)]
    assert cells == [0, 0, 0, 0, 0, 255]
    beside = actual.shape[1] - bare.shape[1]
    assert beside > 60 and 0.001 < (actual[:, :beside] < 120).all(-1).mean() < 0.2  # letters on white


def test_tile():
    images = torch.tensor([0.0, 1.0, 0.5]).reshape(3, 1, 1, 1).expand(3, 1, 2, 4)
    sheet = gan_plots.tile(images, 2, gap=1, zoom=2)
    assert sheet.shape == (11, 19, 3) and sheet.dtype == np.uint8
    assert (sheet[1:5, 1:9] == 0).all() and (sheet[1:5, 10:18] == 255).all() and (sheet[6:10, 1:9] == 128).all()
    assert (sheet[6:, 10:] == 255).all() and (sheet[[0, 5, 10]] == 255).all()
    colour = torch.tensor([10, 20, 30], dtype=torch.uint8).reshape(1, 3, 1, 1)
    assert gan_plots.tile(colour, 1, gap=0).tolist() == [[[10, 20, 30]]]


def test_film_of_arrays_with_labels(tmp_path):
    frames = [gan_plots.tile(torch.full((4, 1, 8, 8), i / 4), 2, zoom=4) for i in range(5)]
    gan_plots.animation(tmp_path / "deep" / "f.gif", frames, 0.1, [f"step {i}" for i in range(5)], hold=1.0)
    with Image.open(tmp_path / "deep" / "f.gif") as film:
        assert film.format == "GIF" and film.n_frames == 5 and film.info["loop"] == 0
        assert film.size == (67, 87)
        for i, duration in enumerate([100, 100, 100, 100, 1000]):
            film.seek(i)
            assert film.info["duration"] == duration
            picture = np.asarray(film.convert("RGB")).astype(int)
            assert abs(picture[10, 10].mean() - 255 * i / 4) <= 2
            assert (picture[68:] < 120).any()  # the label
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["f.gif"]


def test_film_of_files(tmp_path):
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.png")
        gan_plots.points(files[-1], REAL, FAKE + i)
    gan_plots.animation(tmp_path / "f.gif", files)
    with Image.open(tmp_path / "f.gif") as film, Image.open(files[0]) as first:
        assert film.n_frames == 3 and film.size == first.size


SHEET = np.zeros((4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: gan_plots.points(p, REAL, FAKE[0]), r"fake points have shape \(2,\), expected \(count, 2\)"),
        (lambda p: gan_plots.critic_plane(p, lambda x: x[:, 0] / 0 * 0, REAL, FAKE), "no score of the critic is"),
        (lambda p: gan_plots.image_table(p, torch.zeros(2, 3, 2, 4, 4)), r"\(2, 3, 2, 4, 4\)"),
        (lambda p: gan_plots.image_table(p, torch.zeros(2, 3, 1, 4, 4), rows=["a"]), "1 row labels for 2 rows"),
        (lambda p: gan_plots.tile(torch.zeros(2, 4, 4), 2), r"\(2, 4, 4\)"),
        (lambda p: gan_plots.tile(torch.zeros(2, 1, 4, 4), 0), "columns 0"),
        (lambda p: gan_plots.animation(p, []), "at least one frame"),
        (lambda p: gan_plots.animation(p, [SHEET], labels=["a", "b"]), "2 labels for 1 frames"),
        (lambda p: gan_plots.animation(p, [SHEET, SHEET[:2]]), r"frame 1 has width and height \(5, 2\)"),
        (lambda p: gan_plots.animation(p, [SHEET.astype(float)]), "a frame is float64"),
        (lambda p: gan_plots.animation(p, [SHEET], seconds=0), "must be positive"),
    ],
)
def test_errors_name_what_is_wrong(call, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        call(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_saved_pixels(tmp_path):
    pixels = gan_plots.tile(random.uniform(random.key(2), (2, 3, 4, 4)), 2)
    gan_plots.save(tmp_path / "a.png", pixels)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
