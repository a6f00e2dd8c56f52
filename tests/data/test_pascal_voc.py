import pytest

from d2kit.data import DatasetCatalog, DatasetError, MetadataCatalog
from d2kit.data.datasets import load_voc_instances, register_pascal_voc
from d2kit.data.datasets.pascal_voc import CLASS_NAMES, read_voc_annotation
from d2kit.structures import BoxMode
from tests.support.voc_synthetic import CLASSES, SIZE, make, xml


def test_load(tmp_path):
    truths = make(tmp_path, seed=2)
    records = load_voc_instances(str(tmp_path), "test", CLASSES)
    assert [r["image_id"] for r in records] == list(truths)
    assert (records[0]["height"], records[0]["width"]) == SIZE
    assert records[0]["file_name"] == str(tmp_path / "JPEGImages/000000.jpg")
    for record in records:
        objects = truths[record["image_id"]]
        assert len(record["annotations"]) == len(objects)
        for annotation, (name, (x0, y0, x1, y1), _) in zip(
            record["annotations"], objects, strict=True
        ):
            assert annotation == {
                "category_id": CLASSES.index(name),
                "bbox": [x0 - 1, y0 - 1, x1, y1],
                "bbox_mode": BoxMode.XYXY_ABS,
            }


def test_register(tmp_path):
    make(tmp_path)
    register_pascal_voc("zz_voc", str(tmp_path), "test", 2007, CLASSES)
    try:
        assert len(DatasetCatalog.get("zz_voc")) == 8
        assert MetadataCatalog.get("zz_voc").get("evaluator_type") is None  # users set their own
        assert MetadataCatalog.get("zz_voc").thing_classes == list(CLASSES)
    finally:
        DatasetCatalog.remove("zz_voc")
        MetadataCatalog.remove("zz_voc")


def test_classes():
    assert len(CLASS_NAMES) == 20
    assert list(CLASS_NAMES) == sorted(CLASS_NAMES)


BOMB = (
    '<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;&x;">]><annotation>&y;</annotation>'
)
OUTSIDE = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "document type: refused"),
        (OUTSIDE, "document type: refused"),
        ("<annotation><object>", "not valid"),
        ("", "not valid"),
        ("<a>" * 100_000, "not valid"),
        (xml([("cat", [5, 5, 3, 9], 0)]), "object number 0: bndbox: expected xmin <= xmax"),
        (
            xml([("cat", ["nan", 5, 9, 9], 0)]),
            "object number 0: xmin: expected a number, got 'nan'",
        ),
        (xml([("cat", ["1e999", 5, 9, 9], 0)]), "object number 0: xmin: expected a number"),
        (xml([("cat", ["", 5, 9, 9], 0)]), "xmin: expected a number"),
        (xml([("", [1, 5, 9, 9], 0)]), "object number 0: name: expected a class"),
        (xml([], size=(0, 5)), "expected pixels > 0"),
        ("<annotation><size/></annotation>", "size/height: expected a number, got nothing"),
        (
            "<annotation><size><width>5</width><height>5</height></size><object><name>cat</name>"
            "</object></annotation>",
            "bndbox: missing",
        ),
    ],
)
def test_damaged_and_hostile_files(tmp_path, text, message):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(DatasetError, match=message) as caught:
        read_voc_annotation(str(tmp_path / "a.xml"))
    assert str(tmp_path / "a.xml") in str(caught.value)


def test_unknown_class_names_file_and_nearest(tmp_path):
    make(tmp_path)
    with pytest.raises(DatasetError, match=r"000000\.xml object number 1: name.*'cat'.*nearest"):
        load_voc_instances(str(tmp_path), "test", ["cut", "dog", "cow", "rare"])


@pytest.mark.parametrize("line", ["../../etc/passwd", "/etc/passwd", "a\\b", ".."])
def test_ids_stay_in_the_folder(tmp_path, line):
    make(tmp_path)
    (tmp_path / "ImageSets/Main/test.txt").write_text(f"000000\n{line}\n")
    with pytest.raises(DatasetError, match=r"test\.txt: line 2: image id"):
        load_voc_instances(str(tmp_path), "test", CLASSES)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="ImageSets"):
        load_voc_instances(str(tmp_path), "val", CLASSES)
    make(tmp_path)
    (tmp_path / "Annotations/000003.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"000003\.xml"):
        load_voc_instances(str(tmp_path), "test", CLASSES)
