"""Pictures with boxes: VOC's XML, COCO's JSON, and what is wrong in them."""

import json

import pytest
from PIL import Image

from train.data import DataError
from train.data.images import annotations

OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10)).save(path)


def voc(root, name, *objects, image=True):
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    size = "<size><width>20</width><height>10</height></size>"
    text = f"<annotation>{size}{''.join(OBJECT.format(*entry) for entry in objects)}</annotation>"
    (root / "Annotations" / f"{name}.xml").write_text(text)
    if image:
        picture(root / "JPEGImages" / f"{name}.jpg")


@pytest.fixture
def folder(tmp_path):
    """Six pictures, "c" without boxes."""
    for name in "abdef":
        voc(tmp_path, name, ("cat", 1, 1, 20, 10), ("dog", 3, 2, 5, 4))
    voc(tmp_path, "c")
    return tmp_path


def test_voc(folder):
    data = annotations.open_boxes(str(folder))
    assert data.classes == ("cat", "dog") and (len(data.train), len(data.test)) == (5, 1)
    everything = {one.path.stem: one for one in (*data.train, *data.test)}
    assert everything["a"].boxes == ((0, 0, 20, 10), (2, 1, 5, 4)) and everything["a"].size == (20, 10)
    assert everything["c"].boxes == () and annotations.facts(data)["pictures without boxes"] == 1
    assert annotations.open_boxes(str(folder)) == data


def test_lists_of_the_parts(folder):
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb 1\n\nnowhere\n")
    (lists / "val.txt").write_text("c\nd\n")
    (lists / "trainval.txt").write_text("a\nb\nc\nd\n")
    data = annotations.open_boxes(str(folder))
    assert [one.path.stem for one in data.train] == ["a", "b"] and [one.path.stem for one in data.test] == ["c", "d"]
    assert [reason for _, reason in data.skipped] == [
        "names 'nowhere', of which there is no picture with an annotation"
    ]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (("cat", 5, 5, 5, 9), "object 2 has a box of no area"),
        (("cat", 9, 5, 4, 9), "object 2 has a box with its corners exchanged"),
        (("cat", 30, 2, 40, 9), "object 2 has a box outside its picture"),
        (("cat", "x", 2, 4, 9), "object 2 has no box"),
        (("", 1, 2, 4, 9), "object 2 has no name"),
    ],
)
def test_bad_objects_are_named_and_skipped(entry, reason, folder):
    voc(folder, "b", ("cat", 1, 1, 20, 10), entry)
    data = annotations.open_boxes(str(folder))
    assert data.skipped == ((folder / "Annotations" / "b.xml", reason),)
    assert next(one for one in (*data.train, *data.test) if one.path.stem == "b").labels == ("cat",)


def test_pictures_and_annotations_without_each_other(folder):
    voc(folder, "g", image=False)
    picture(folder / "JPEGImages" / "h.jpg")
    (folder / "Annotations" / "a.xml").write_text("<annotation>")
    data = annotations.open_boxes(str(folder))
    reasons = {path.name: reason for path, reason in data.skipped}
    assert reasons["g.xml"] == "an annotation without its picture"
    assert reasons["h.jpg"] == "a picture without its annotation"
    assert reasons["a.xml"].startswith("is no annotation: ") and len(data.train) + len(data.test) == 5


def test_classes_of_a_trained_net(folder):
    data = annotations.open_boxes(str(folder), classes=("cat",))
    assert data.classes == ("cat",) and all(set(one.labels) <= {"cat"} for one in (*data.train, *data.test))
    assert len(data.skipped) == 5 and data.skipped[0][1] == "boxes of the unknown class 'dog'"


def coco(folder, **changes):
    content = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 20, "height": 10}, {"id": 9, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": 7, "category_id": 3, "bbox": [1, 2, 4, 5]},
            {"image_id": 7, "category_id": 4, "bbox": [0, 0, 50, 5], "iscrowd": 1},
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}],
    }
    for name in ("a", "b"):
        picture(folder / "images" / f"{name}.jpg")
    (folder / "boxes.json").write_text(json.dumps(content | changes))
    return str(folder / "boxes.json")


def test_coco(tmp_path):
    path = coco(tmp_path)
    data = annotations.open_boxes(f"{path},{path}")
    assert data.train == data.test and data.classes == ("cat", "dog") and not data.skipped
    first, second = data.train
    assert first.boxes == ((1, 2, 5, 7), (0, 0, 20, 5)) and first.crowd == (False, True) and second.boxes == ()


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"image_id": 1, "category_id": 3, "bbox": [1, 2, 4, 5]}, "is of image 1, which is not there"),
        ({"image_id": 7, "category_id": 5, "bbox": [1, 2, 4, 5]}, "has the category 5, which has no name"),
        ({"image_id": 7, "category_id": 3, "bbox": [1, 2, 0, 5]}, "has a box of no area"),
        ({"image_id": 7, "category_id": 3, "bbox": [1, 2]}, "has no box of four numbers"),
        ({"image_id": 7, "category_id": 3}, "has no box of four numbers"),
    ],
)
def test_bad_annotations_of_coco(entry, reason, tmp_path):
    good = {"image_id": 7, "category_id": 3, "bbox": [1, 2, 4, 5]}
    path = coco(tmp_path, annotations=[good, entry])
    data = annotations.open_boxes(f"{path},{path}")
    assert data.skipped[:1] == ((tmp_path / "boxes.json", f"annotation 2 {reason}"),)


def test_pictures_of_coco_that_are_not_there(tmp_path):
    images = [{"id": i, "file_name": name} for i, name in enumerate(("a.jpg", "b.jpg", "../../etc/no.jpg"))]
    data = annotations.open_boxes(
        coco(
            tmp_path,
            images=[*images, {"file_name": "a.jpg"}],
            annotations=[
                {"image_id": 0, "category_id": 3, "bbox": [1, 2, 4, 5]},
                {"image_id": 1, "category_id": 3, "bbox": [1, 2, 4, 5]},
            ],
        )
    )
    assert [reason for _, reason in data.skipped] == [
        "image 3 names '../../etc/no.jpg', which is not there",
        "image 4 has no id",
    ]


def test_errors(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    bad = empty / "bad.json"
    bad.write_text("{")
    for data, message in (
        (str(empty / "none"), "does not exist"),
        (str(bad), "is no JSON"),
        (coco(empty, categories=None).replace("boxes", "bad"), "is no JSON"),
    ):
        with pytest.raises(DataError, match=message):
            annotations.open_boxes(data)
    with pytest.raises(DataError, match="no picture of the training part has a box"):
        annotations.open_boxes(coco(empty, annotations=[]))
    bad.write_text("{}")
    with pytest.raises(DataError, match="has no 'images'"):
        annotations.open_boxes(str(bad))
    with pytest.raises(DataError, match="has no XML file"):
        annotations.open_boxes(str(empty / "images"))
