"""Mask files of every kind, tables of classes read and inferred, and pixels that a table does not know."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.data import DataError
from train.data.images import masks
from train.data.images.masks import OBJECTS, VOID, Mask, Table, infer, labelled, packed, read_mask, read_table

LABELS = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
COLOURS = np.array([[0, 0, 0], [200, 0, 10], [0, 90, 255]], np.uint8)


def write(path: Path, values: np.ndarray, mode: str | None = None, palette: np.ndarray | None = None) -> Path:
    image = Image.fromarray(values)
    if palette is not None:
        image.putpalette(palette.tobytes())
    (image if mode is None else image.convert(mode)).save(path)
    return path


def labels_of(path: Path, table: Table | None = None) -> list:
    mask = read_mask(path)
    return labelled(mask, table or infer([mask])).tolist()


def test_one_mask_in_every_form_has_the_same_labels(tmp_path):
    files = {
        "grey": write(tmp_path / "grey.png", LABELS),
        "other values": write(tmp_path / "values.png", np.array([0, 7, 99], np.uint8)[LABELS]),
        "16 bits": write(tmp_path / "deep.png", np.array([0, 700, 9000], np.uint16)[LABELS]),
        "floats": write(tmp_path / "floats.tif", LABELS.astype(np.float32)),
        "palette": write(tmp_path / "palette.png", LABELS, palette=COLOURS),
        "gif": write(tmp_path / "palette.gif", LABELS, palette=COLOURS),
        "grey as colour": write(tmp_path / "rgb.png", LABELS, "RGB"),
        "grey with alpha": write(tmp_path / "la.png", LABELS, "LA"),
        "colour with alpha": write(tmp_path / "rgba.png", COLOURS[LABELS][:, ::-1], "RGBA"),
    }
    for kind, path in files.items():
        expected = LABELS[:, ::-1] if kind == "colour with alpha" else LABELS
        # Of colours, blue (0, 90, 255) comes before red (200, 0, 10) in ascending order.
        expected = np.array([0, 2, 1])[expected] if kind == "colour with alpha" else expected
        assert labels_of(path) == expected.tolist(), kind
    bits = Image.fromarray(255 * (LABELS > 0).astype(np.uint8)).convert("1")
    bits.save(tmp_path / "bits.png")
    assert labels_of(tmp_path / "bits.png") == (LABELS > 0).astype(int).tolist()


def test_a_table_of_colours_reads_palettes_and_grey_too(tmp_path):
    (tmp_path / "classes.txt").write_text("0 0 0 sky\n200 0 10 road\n0 90 255 car\n", encoding="utf-8")
    table = read_table(tmp_path / "classes.txt")
    assert table.classes == ("sky", "road", "car") and table.coloured
    assert labels_of(write(tmp_path / "rgb.png", COLOURS[LABELS]), table) == LABELS.tolist()
    assert labels_of(write(tmp_path / "palette.png", LABELS, palette=COLOURS), table) == LABELS.tolist()
    assert labels_of(write(tmp_path / "grey.png", np.zeros((2, 3), np.uint8)), table) == np.zeros((2, 3)).tolist()


def test_palettes_in_different_orders_are_compared_by_colour(tmp_path):
    """As of programs that sort the palette of each file by itself: entry 1 is red in one and blue in the other."""
    one = read_mask(write(tmp_path / "one.png", LABELS, palette=COLOURS))
    order = np.array([0, 2, 1], np.uint8)
    other = read_mask(write(tmp_path / "other.png", order[LABELS], palette=COLOURS[order]))
    table = infer([one, other])
    assert table.coloured and labelled(one, table).tolist() == labelled(other, table).tolist()
    assert not infer([one, one]).coloured


def grey(*values: int) -> Mask:
    return Mask(np.array([values], np.int32), {}, False)


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [
        ((0, 255, 0), ("background", "object"), (0, 1, 0)),
        ((0, 1), ("background", "object"), (0, 1)),
        ((0, 1, 2, 255), ("0", "1", "2"), (0, 1, 2, VOID)),  # Pascal VOC's
        ((0, 128, 255), ("0", "128", "255"), (0, 1, 2)),
        ((1, 2), ("1", "2"), (0, 1)),
        ((1, 2, 255), ("1", "2"), (0, 1, VOID)),
    ],
)
def test_values_are_inferred(values, classes, labels):
    table = infer([grey(*values)])
    assert table.classes == classes and labelled(grey(*values), table).tolist() == [list(labels)]
    assert table.background == (classes[0] == "background")


def test_maps_of_objects_are_their_union():
    assert labelled(grey(0, 3, 700, 0), OBJECTS).tolist() == [[0, 1, 1, 0]]
    with pytest.raises(DataError, match="is in colour, expected a map of objects"):
        labelled(Mask(np.array([[packed((1, 2, 3))]]), {}, True), OBJECTS)


def test_a_jpeg_has_two_values_or_is_refused(tmp_path):
    """As the masks of Kvasir-SEG, whose pixels are anything near 0 and 255."""
    rows, columns = np.mgrid[:60, :80]
    disc = ((rows - 30) ** 2 + (columns - 35) ** 2 < 400).astype(np.uint8)
    path = write(tmp_path / "disc.jpg", 255 * disc)
    assert len(np.unique(np.asarray(Image.open(path)))) > 10
    assert (np.array(labels_of(path)) == disc).mean() > 0.99
    assert (np.array(labels_of(write(tmp_path / "rgb.jpg", 255 * disc, "RGB"))) == disc).mean() > 0.99
    write(tmp_path / "classes.jpg", 20 * (rows // 6).astype(np.uint8))
    with pytest.raises(DataError, match="classes.jpg is a JPEG of more than two values, which compression mixes"):
        read_mask(tmp_path / "classes.jpg")


def test_black_and_red_are_background_and_object(tmp_path):
    mask = read_mask(write(tmp_path / "red.png", COLOURS[LABELS.clip(max=1)]))
    assert infer([mask]).classes == ("background", "object")
    assert labelled(mask, infer([mask])).tolist() == LABELS.clip(max=1).tolist()


def test_camvid_has_eleven_classes_and_void():
    table = masks.camvid_table()
    assert len(table.classes) == 11 and table.classes[0] == "sky" and not table.background
    assert labelled(grey(0, 10, 11), table).tolist() == [[0, 10, VOID]]


def test_what_cannot_be_classes_is_refused(tmp_path):
    with pytest.raises(DataError, match="have 100 values, which are too many to be classes: .* folder 'instances'"):
        infer([grey(*range(100))])
    with pytest.raises(DataError, match="all pixels of the masks have the value 3; expected two classes"):
        infer([grey(3, 3)])
    fractions = write(tmp_path / "fractions.tif", np.full((2, 2), 0.5, np.float32))
    with pytest.raises(DataError, match=r"fractions.tif holds fractions \(0.5 to 0.5\), expected a mask"):
        read_mask(fractions)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(DataError, match="empty.png cannot be read as a picture: it is empty"):
        read_mask(tmp_path / "empty.png")


def test_unknown_values_and_colours_are_named():
    table = infer([grey(0, 1, 2)])
    with pytest.raises(DataError, match="has the unknown value 7 in 2 pixels, expected the values 0, 1, 2"):
        labelled(grey(0, 7, 7), table)
    with pytest.raises(DataError, match="is in colour, expected the values 0, 1, 2"):
        labelled(Mask(np.array([[packed((1, 2, 3))]]), {}, True), table)
    coloured = Table(("a", "b"), {packed((0, 0, 0)): 0, packed((255, 0, 0)): 1}, True)
    values = np.array([[packed(c) for c in ((0, 0, 1), (0, 0, 2), (0, 0, 3), (9, 9, 9))]])
    message = r"colour \(0, 0, 1\), colour \(0, 0, 2\), colour \(0, 0, 3\) and 1 more in 4 pixels, expected the colours"
    with pytest.raises(DataError, match=message):
        labelled(Mask(values, {}, True), coloured)


@pytest.mark.parametrize(
    ("text", "classes", "labels"),
    [
        ("sky\nroad\n", ("sky", "road"), {0: 0, 1: 1}),
        ("# of the camera\n3 sky\n7 main road\n255 void\n", ("sky", "main road"), {3: 0, 7: 1, 255: VOID}),
        ("name,r,g,b\nsky,0,0,1\nroad,0,1,0\n", ("sky", "road"), {1: 0, 256: 1}),
        ("64 128 64\tAnimal\n192 0 128\tArch\n", ("Animal", "Arch"), {0x408040: 0, 0xC00080: 1}),
        ("0 7\n1 9\n", ("7", "9"), {0: 0, 1: 1}),
        ("0 sky\n1 sky\n2 road\n", ("sky", "road"), {0: 0, 1: 0, 2: 1}),
    ],
)
def test_files_of_classes(tmp_path, text, classes, labels):
    (tmp_path / "classes.txt").write_text(text, encoding="utf-8-sig")
    table = read_table(tmp_path / "classes.txt")
    assert (table.classes, table.labels) == (classes, labels)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "has no line"),
        ("0 sky\n1 2 3 road\n", "has lines of several forms"),
        ("0 sky\n0 road\n", "two classes have the value 0"),
        ("0 sky\n", "has 1 classes"),
        ("300 0 0 sky\n0 0 0 road\n", "line 1: a colour is three numbers from 0 to 255"),
        ("0\n1\n", "line 1 has no name"),
    ],
)
def test_bad_files_of_classes_are_refused(tmp_path, text, error):
    (tmp_path / "classes.txt").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=error):
        read_table(tmp_path / "classes.txt")
    with pytest.raises(DataError, match="cannot read"):
        read_table(tmp_path / "missing.txt")
