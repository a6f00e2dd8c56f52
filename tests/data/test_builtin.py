import json

import pytest

from d2kit.data import DatasetCatalog, DatasetError, MetadataCatalog, catalog
from d2kit.data.catalog import _get_builtin_metadata
from d2kit.data.datasets import builtin
from tests.support.reference_files import reference_path


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Catalogs as after an import, with the public datasets below an empty folder."""
    monkeypatch.setenv("D2KIT_DATASETS", str(tmp_path))
    for table in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(table, "data", {})
    names = [name for _, family in builtin._FAMILIES for name in family]
    monkeypatch.setattr(catalog, "_PENDING", dict.fromkeys(names, builtin.register_builtin))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind", "classes"),
    [
        ("coco_2017_val", "coco", ("thing_classes", 80)),
        ("keypoints_coco_2017_val_100", "coco", ("keypoint_names", 17)),
        ("coco_2017_val_panoptic", "coco_panoptic_seg", ("stuff_classes", 133)),
        ("coco_2017_val_panoptic_separated", "coco_panoptic_seg", ("thing_classes", 80)),
        ("coco_2017_val_100_panoptic_stuffonly", "sem_seg", ("stuff_classes", 54)),
        ("lvis_v1_val", "lvis", None),
        ("lvis_v1_train_cocofied", "lvis", ("thing_classes", 80)),
        ("voc_2007_test", "pascal_voc", ("thing_classes", 20)),
        ("cityscapes_fine_instance_seg_val", "cityscapes_instance", ("thing_classes", 8)),
        ("cityscapes_fine_sem_seg_val", "cityscapes_sem_seg", ("stuff_classes", 19)),
        ("ade20k_sem_seg_val", "sem_seg", None),
    ],
)
def test_facts(fresh, name, kind, classes):
    metadata = MetadataCatalog.get(name)
    assert metadata.evaluator_type == kind
    if classes:
        assert len(metadata.get(classes[0])) == classes[1]
    assert list(DatasetCatalog.data) == [name]  # the others stay as they are
    with pytest.raises((FileNotFoundError, OSError)):
        DatasetCatalog.get(name)


def test_paths(fresh):
    metadata = MetadataCatalog.get("coco_2017_val_100_panoptic_separated")
    coco = fresh / "coco"
    assert metadata.panoptic_json == str(coco / "annotations/panoptic_val2017_100.json")
    assert metadata.panoptic_root == str(coco / "panoptic_val2017_100")
    assert metadata.sem_seg_root == str(coco / "panoptic_stuff_val2017_100")
    assert metadata.json_file == str(coco / "annotations/instances_val2017_100.json")
    assert metadata.image_root == str(coco / "val2017")
    assert MetadataCatalog.get("voc_2012_trainval").year == 2012
    file = MetadataCatalog.get("lvis_v1_test_dev").json_file
    assert file == str(fresh / "lvis/lvis_v1_image_info_test_dev.json")


def test_listing_registers_nothing(fresh):
    assert "lvis_v1_train" in DatasetCatalog.list()
    assert not DatasetCatalog.data


def test_every_dataset_of_the_zoo_is_known(fresh):
    zoo = json.loads(reference_path("zoo_configs.json").read_text())
    names = {
        name
        for config in zoo.values()
        for key in ("DATASETS.TRAIN", "DATASETS.TEST")
        for name in config.get(key, ())
    }
    assert len(names) > 10
    for name in names:
        assert name in DatasetCatalog
        assert MetadataCatalog.get(name).evaluator_type


def test_unknown_name():
    with pytest.raises(KeyError, match="no public dataset"):
        builtin.register_builtin("coco_2018_val")


def test_panoptic_numbers():
    separated = _get_builtin_metadata("coco_panoptic_separated")
    assert separated["stuff_classes"][0] == "things"
    assert separated["stuff_dataset_id_to_contiguous_id"][0] == 0
    assert separated["stuff_dataset_id_to_contiguous_id"][92] == 1  # banner
    assert separated["stuff_dataset_id_to_contiguous_id"][200] == 53
    standard = _get_builtin_metadata("coco_panoptic_standard")
    things = standard["thing_dataset_id_to_contiguous_id"]
    stuff = standard["stuff_dataset_id_to_contiguous_id"]
    assert sorted([*things.values(), *stuff.values()]) == list(range(133))
    assert standard["stuff_classes"][stuff[200]] == "rug-merged"
    assert standard["thing_classes"][things[90]] == "toothbrush"


def test_classes_of_ade20k(fresh):
    folder = fresh / "ADEChallengeData2016"
    folder.mkdir()
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.1\t1\t1\twall", "2\t0.1\t1\t1\tscreen, panel"]
    rows += ["3\t0.1\t1\t1\tscreen, silver screen"]
    (folder / "objectInfo150.txt").write_text("\n".join(rows))
    metadata = MetadataCatalog.get("ade20k_sem_seg_train")
    assert metadata.stuff_classes == ["wall", "screen, panel", "screen, silver screen"]
    assert metadata.ignore_label == 255
    (folder / "objectInfo150.txt").write_text("\n".join([rows[0], rows[2]]))
    with pytest.raises(DatasetError, match=r"objectInfo150\.txt: line 2: expected class 1"):
        MetadataCatalog.get("ade20k_sem_seg_val")
