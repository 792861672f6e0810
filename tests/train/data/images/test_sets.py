"""The images that `--data` names: every kind, layouts of folders, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.dummy import DummyClassifier
from sklearn.neighbors import NearestCentroid

from core import random
from tests.train.data.images.image_files import save, write_cifar, write_mnist, write_pictures
from train.data import DataError
from train.data.images import arrays, cifar
from train.data.images import sets as image_sets

KEY = random.key(5)


# What is opened.


def test_digits():
    actual = image_sets.open_images("digits")
    assert actual.kind == "digits" and actual.in_memory and actual.channels == 1
    assert actual.classes == tuple("0123456789")
    for digits, test in ((actual, 297), (image_sets.digits(1000), 1000)):
        expected = arrays.digits(test)
        assert len(digits.test.labels) == test and digits.name == "digits"
        assert all(torch.equal(a, b) for a, b in zip(digits.train + digits.test, sum(expected, ()), strict=True))


def test_a_folder_in_mnists_format(tmp_path):
    actual = image_sets.open_images(str(write_mnist(tmp_path)))
    assert actual.kind == "mnist" and actual.in_memory and actual.channels == 1
    assert actual.classes == ("0", "1", "2")
    assert actual.train.images.shape == (5, 1, 6, 4) and actual.train.labels.tolist() == [0, 1, 2, 1, 0]
    assert actual.test.labels.tolist() == [2, 0]


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_a_folder_with_cifars_batches(inner, tmp_path):
    write_cifar(tmp_path / inner)
    actual = image_sets.open_images(str(tmp_path))
    assert actual.kind == "cifar10" and actual.channels == 3 and actual.classes == cifar.CLASSES
    assert actual.train.images.shape == (3, 3, 32, 32) and actual.train.labels.tolist() == [3, 9, 0]
    assert actual.test.labels.tolist() == [5]


@pytest.mark.parametrize("test", ["val", "validation", "test"])
def test_class_folders_in_two_parts(test, tmp_path):
    write_pictures(tmp_path / "train", "abc", 2)
    save(tmp_path / test / "c" / "0.png", 0)
    actual = image_sets.open_images(str(tmp_path))
    assert actual.kind == "folder" and not actual.in_memory and actual.channels == 3
    assert actual.classes == actual.test.classes == ("a", "b", "c")
    assert actual.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and actual.test.labels.tolist() == [2]
    assert {path.parts[-3] for path in actual.train.paths} == {"train"}
    assert actual.test.paths == (tmp_path / test / "c" / "0.png",)


def test_val_goes_before_test(tmp_path):
    for part in ("train", "test", "val"):
        write_pictures(tmp_path / part, "ab", 1)
    actual = image_sets.open_images(str(tmp_path))
    assert {path.parts[-3] for path in actual.test.paths} == {"val"}


def test_an_undivided_folder_gives_a_fifth_for_testing(pictures):
    actual = image_sets.open_images(str(pictures))
    assert len(actual.train.paths) == 15 and len(actual.test.paths) == 3  # of 18
    together = actual.train.paths + actual.test.paths
    assert set(together) == {p for p in pictures.rglob("*.png")} and len(set(together)) == 18
    for part in (actual.train, actual.test):
        assert [actual.classes[label] for label in part.labels.tolist()] == [path.parent.name for path in part.paths]
        assert list(part.paths) == sorted(part.paths) and part.classes == ("a", "b", "c")
    assert len(set(actual.train.labels.tolist())) == 3
    again = image_sets.open_images(str(pictures))
    assert again.train.paths == actual.train.paths and again.test.paths == actual.test.paths


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: None, "--data '.*' does not exist; expected a folder of images, or one of digits, cifar10"),
        (lambda d: d.write_text(""), "--data '.*' is a file; expected a folder of images, or one of digits"),
        (lambda d: d.mkdir(), "has no sub-folders, expected one per class"),
        (lambda d: (d / "a").mkdir(parents=True), "no picture in the sub-folders of"),
        (lambda d: write_pictures(d, "a"), "has the one class 'a'; expected at least two"),
        (lambda d: write_pictures(d / "train", "a"), "has the one class 'a'; expected at least two"),
        (lambda d: write_pictures(d, count=2), "has 4 pictures; expected at least 5, of which one is for testing"),
        (
            lambda d: [write_pictures(d / "train", count=1), write_pictures(d / "val", "x", 1)],
            "val/x is none of the 2 classes of the training part",
        ),
        (lambda d: [write_pictures(d / "train", count=1), (d / "val").mkdir()], "val has no sub-folders"),
        (lambda d: write_mnist(d, (0, 0), (0,)), "has the one class '0'; expected at least two"),
        (lambda d: write_mnist(d, (0, -1), (1,), 0x09), "has the label -1; expected 0 or more"),
        (lambda d: write_mnist(d, (0, 1), ()), "has no images to test on"),
        (lambda d: write_mnist(d, (), (0, 1)), "has no images to train on"),
        (lambda d: (write_mnist(d) / "t10k-images-idx3-ubyte.gz").unlink(), "no t10k-images-idx3-ubyte or"),
        (lambda d: (write_cifar(d) / "test_batch.bin").unlink(), "no CIFAR-10 in"),
    ],
    ids=(
        "missing file empty no-picture one-class train-alone few unknown-class empty-val "
        "one-digit negative no-test no-train mnist-part cifar-part"
    ).split(),
)
def test_what_is_no_image_set(prepare, message, tmp_path):
    prepare(tmp_path / "data")
    with pytest.raises(DataError, match=message) as caught:
        image_sets.open_images(str(tmp_path / "data"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [("train", "valid"), ("Train", "Test"), ("training", "dev"), ("TRAIN", "VAL")])
def test_splits_by_other_names(names, tmp_path):
    """Roboflow, fastai, Kaggle: `train` and `valid` are no classes."""
    for part, count in zip(names, (3, 2), strict=True):
        write_pictures(tmp_path / part, "ab", count)
    actual = image_sets.open_images(str(tmp_path))
    assert actual.classes == ("a", "b") and (len(actual.train.paths), len(actual.test.paths)) == (6, 4)
    facts = image_sets.facts(actual)
    assert facts["classes"] == {"a": 3, "b": 3}
    assert facts["images to train on"] == f"6 ({names[0]})" and facts["images to test on"] == f"4 ({names[1]})"


def test_a_training_folder_alone_is_divided(tmp_path):
    write_pictures(tmp_path / "train", "ab", 5)
    actual = image_sets.open_images(str(tmp_path))
    assert (len(actual.train.paths), len(actual.test.paths)) == (8, 2)
    assert actual.origin == ("four fifths of train", "one fifth of train")


def test_pictures_to_test_on_without_classes_are_said(tmp_path):
    write_pictures(tmp_path / "train", "ab", 5)
    for number in range(3):
        save(tmp_path / "test" / f"{number}.png", number)
    actual = image_sets.open_images(str(tmp_path))
    assert (len(actual.train.paths), len(actual.test.paths)) == (8, 2)
    assert actual.skipped == ((tmp_path / "test", "is not used: its pictures have no classes"),)
    flat = image_sets.open_images(str(tmp_path), labelled=False)
    assert (len(flat.train.paths), len(flat.test.paths)) == (10, 3)


def test_pictures_of_one_name_stay_together(tmp_path):
    for number in range(10):
        save(tmp_path / "ab"[number % 2] / f"{number}.png", number)
        save(tmp_path / "ab"[number % 2] / f"{number}.jpg", number)
    actual = image_sets.open_images(str(tmp_path))
    assert len(actual.test.paths) == 4 and len(actual.train.paths) == 16
    assert len({path.stem for path in actual.test.paths}) == 2
    assert len(image_sets.facts(actual)["pictures of one name"]) == 10


def test_nothing_is_held_out_of_what_is_judged(pictures):
    actual = image_sets.open_images(str(pictures), part="all")
    assert len(actual.test.paths) == 18 and actual.train is actual.test
    assert image_sets.facts(actual)["images to test on"] == "18 (all of the folder)"
    assert "images to train on" not in image_sets.facts(actual)
    with pytest.raises(DataError, match="part is 'half', expected split or all"):
        image_sets.open_images(str(pictures), part="half")
    read = image_sets.read_all(str(pictures), 16, part="all")
    assert len(read.test.labels) == 18 and read.train is read.test


def test_a_division_is_kept_and_a_part_alone_is_judged(tmp_path):
    write_pictures(tmp_path / "train", "ab", 3)
    write_pictures(tmp_path / "val", "ab", 2)
    assert len(image_sets.open_images(str(tmp_path), part="all").test.paths) == 4
    assert len(image_sets.open_images(str(tmp_path / "train"), part="all").test.paths) == 6
    write_pictures(tmp_path / "other" / "test", "ab", 2)
    assert len(image_sets.open_images(str(tmp_path / "other"), part="all").test.paths) == 4
    with pytest.raises(DataError, match="looks like a split, by its folder test, but has no folder train"):
        image_sets.open_images(str(tmp_path / "other"))


def test_labels_are_those_of_a_trained_net(tmp_path):
    write_pictures(tmp_path / "some", "c", 3)
    save(tmp_path / "some" / "e" / "0.png", 0)
    actual = image_sets.open_images(str(tmp_path / "some"), part="all", classes=tuple("abcde"))
    assert actual.classes == tuple("abcde") and actual.test.labels.tolist() == [2, 2, 2, 4]
    assert image_sets.facts(actual)["classes without test images"] == ["a", "b", "d"]
    with pytest.raises(DataError, match="some/c is none of the 2 classes"):
        image_sets.open_images(str(tmp_path / "some"), part="all", classes=("a", "e"))
    write_mnist(tmp_path / "mnist")
    numbers = image_sets.open_images(str(tmp_path / "mnist"), classes=tuple("0123456789"))
    assert len(numbers.classes) == 10 and numbers.test.labels.tolist() == [2, 0]
    turned = image_sets.open_images(str(tmp_path / "mnist"), classes=("2", "1", "0"))
    assert turned.test.labels.tolist() == [0, 2]
    fashion = image_sets.open_images(str(tmp_path / "mnist"), classes=image_sets.FASHION)
    assert fashion.classes == image_sets.FASHION and fashion.test.labels.tolist() == [2, 0]
    with pytest.raises(DataError, match="has the class '0', which is none of the 2 known: a, b"):
        image_sets.open_images(str(tmp_path / "mnist"), classes=("a", "b"))


# Without classes.


def test_generative_models_take_a_flat_folder(tmp_path, caplog):
    for number in range(11):
        save(tmp_path / "faces" / f"{number:02}.png", number)
    (tmp_path / "faces" / "07.png").write_bytes(b"no picture")
    data = image_sets.read_all(str(tmp_path / "faces"), 8)
    assert data.classes == ("pictures",) and len(data.train.labels) + len(data.test.labels) == 10
    assert data.train.images.shape[1:] == (3, 8, 8) and data.train.images.max() <= 1
    assert [path.name for path, _ in data.skipped] == ["07.png"] and "skipped" in caplog.text
    assert image_sets.facts(data)["skipped"] == list(data.skipped)
    with pytest.raises(DataError, match="has no sub-folders, expected one per class"):
        image_sets.read_all(str(tmp_path / "faces"), 8, labelled=True)
    write_pictures(tmp_path / "one", "a", 5)
    assert len(image_sets.read_all(str(tmp_path / "one"), 8).train.labels) == 4


def test_nothing_but_unreadable_pictures(tmp_path):
    for number in range(5):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the 4 pictures can be read"):
        image_sets.read_all(str(tmp_path), 8)


def test_pictures_of_a_list(tmp_path, caplog):
    write_pictures(tmp_path, "a", 3)
    (tmp_path / "a" / "1.png").write_bytes(b"no picture")
    paths = [tmp_path / "a" / f"{number}.png" for number in (2, 1, 0)] + [tmp_path / "gone.png"]
    actual = image_sets.pictures(paths, 12, 16)
    assert actual.paths == (paths[0], paths[2]) and [path for path, _ in actual.skipped] == [paths[1], paths[3]]
    for path, pixels in zip(actual.paths, actual.images, strict=True):
        assert torch.equal(pixels, image_sets.image(path, 12, 16))
    with pytest.raises(DataError, match="none of the 2 pictures can be read"):
        image_sets.pictures(paths[1::2], 12, 16)


@pytest.mark.parametrize(
    ("name", "write", "kind", "classes"),
    [
        ("mnist", write_mnist, "mnist", ("0", "1", "2")),
        ("fashion-mnist", lambda d: write_mnist(d, tuple(range(10))), "mnist", image_sets.FASHION),
        ("cifar10", write_cifar, "cifar10", cifar.CLASSES),
    ],
)
def test_known_names_are_downloaded(name, write, kind, classes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    requests = []

    def download(name):
        requests.append(name)
        return write(tmp_path / "cache")

    monkeypatch.setattr(arrays, "download", download)
    actual = image_sets.open_images(name)
    assert requests == [name] and actual.kind == kind and actual.classes == classes
    write_pictures(tmp_path / name)  # a folder of this name goes first
    assert image_sets.open_images(name).kind == "folder" and requests == [name]


def test_all_of_them_as_numbers(pictures):
    digits = image_sets.read_all("digits", 16)
    assert digits.train.images.shape[2:] == (16, 16) and 0 <= digits.train.images.min() < digits.train.images.max() <= 1
    folder = image_sets.read_all(str(pictures), 12)
    assert folder.in_memory and folder.train.images.dtype == torch.float32 and folder.train.images.max() <= 1
    assert folder.train.images.shape[1:] == (3, 12, 12)
    files = image_sets.open_images(str(pictures))
    assert len(folder.train.labels) == len(files.train.labels) and len(folder.test.labels) == len(files.test.labels)
    first = image_sets.image(files.train.paths[0], 12, 12)
    torch.testing.assert_close(folder.train.images[0], first / 255)


@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_")  # pixels that are always blank
def test_baselines_are_scikit_learns():
    data = image_sets.open_images("digits")
    parts = [(part.images.flatten(1).numpy(), part.labels.numpy()) for part in (data.train, data.test)]
    expected = [model.fit(*parts[0]).score(*parts[1]) for model in (DummyClassifier(), NearestCentroid())]
    assert list(image_sets.baselines(data).values()) == pytest.approx(expected)


def test_baselines_of_files_and_without_a_class(tmp_path, pictures):
    (name,) = image_sets.baselines(image_sets.open_images(str(pictures)))
    assert name == "commonest_class_accuracy"
    data = image_sets.open_images(str(write_mnist(tmp_path, (0, 3, 3))))
    assert image_sets.baselines(data)["commonest_class_accuracy"] == 0.0  # its tests are a 2 and a 0
    near = data._replace(test=data.train)
    assert image_sets.baselines(near)["nearest_mean_accuracy"] == 1.0


def test_resized(tmp_path, pictures):
    data = image_sets.open_images(str(write_mnist(tmp_path)))
    before = data.train.images.clone()
    actual = image_sets.resized(data, 3)
    assert actual.train.images.shape == (5, 1, 3, 3) and actual.test.images.shape == (2, 1, 3, 3)
    # Pillow smooths in the same way where it scales down.
    grey = Image.fromarray((before[0, 0] * 255).round().to(torch.uint8).numpy())
    expected = torch.from_numpy(np.asarray(grey.resize((3, 3), Image.Resampling.BILINEAR), np.float32) / 255)
    torch.testing.assert_close(actual.train.images[0, 0], expected, rtol=0, atol=1.01 / 255)
    assert torch.equal(data.train.images, before) and torch.equal(actual.train.labels, data.train.labels)
    assert image_sets.resized(actual, 3).train.images is actual.train.images
    files = image_sets.open_images(str(pictures))
    assert image_sets.resized(files, 3) == files


def test_an_image_in_grey_and_its_middle(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = (0, 255, 0)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    actual = image_sets.image(tmp_path / "wide.png", 10, 20)
    assert torch.equal(actual, torch.tensor([0, 255, 0], dtype=torch.uint8)[:, None, None].expand(3, 10, 10))
    grey = image_sets.image(tmp_path / "wide.png", 20, 20, channels=1)
    assert grey.shape == (1, 20, 20) and (grey == 150).all()  # 0.587 * 255, rounded
