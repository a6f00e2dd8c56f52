import copy
import importlib
import pickle

import numpy as np
import pytest

from d2kit.data import catalog
from d2kit.data.catalog import DatasetCatalog, Metadata, MetadataCatalog, register_on_use
from d2kit.data.datasets import builtin


@pytest.fixture
def name():
    yield "zz_catalog_test"
    for table in (DatasetCatalog, MetadataCatalog):
        for key in ("zz_catalog_test", "zz_lazy"):
            table.data.pop(key, None)


def test_register_get_list_remove(name):
    DatasetCatalog.register(name, lambda: [1, 2])
    assert DatasetCatalog.get(name) == [1, 2]
    assert name in DatasetCatalog
    assert name in DatasetCatalog.list()
    with pytest.raises(ValueError, match="already registered"):
        DatasetCatalog.register(name, list)
    DatasetCatalog.remove(name)
    assert name not in DatasetCatalog
    DatasetCatalog.register(name, list)
    assert DatasetCatalog.pop(name) is list


def test_unknown_dataset_lists_nearest(name):
    DatasetCatalog.register(name, list)
    with pytest.raises(KeyError, match=rf"{name}.*register_dataset"):
        DatasetCatalog.get("zz_catalog_tset")
    with pytest.raises(KeyError, match="nearest: coco_2017_val"):
        DatasetCatalog.get("coco_2017_vall")
    with pytest.raises(KeyError, match="not registered"):
        DatasetCatalog.remove("zz_never")


def test_register_needs_a_function(name):
    with pytest.raises(TypeError, match="function"):
        DatasetCatalog.register(name, [1, 2])


def test_metadata_is_set_once(name):
    meta = MetadataCatalog.get(name).set(thing_classes=["a"], n=1)
    assert MetadataCatalog.get(name) is meta
    meta.thing_classes = ["a"]
    with pytest.raises(ValueError, match=r"thing_classes.*zz_catalog_test.*\['a'\].*\['b'\]"):
        meta.thing_classes = ["b"]
    with pytest.raises(AttributeError, match="nearest: thing_classes"):
        _ = meta.thing_class
    assert meta.get("absent", 5) == 5
    assert meta.get("n") == 1
    assert not hasattr(meta, "absent")
    assert meta.as_dict() == {"name": name, "thing_classes": ["a"], "n": 1}
    assert meta.name == name
    meta.array = np.arange(3)
    meta.array = np.arange(3)
    with pytest.raises(ValueError, match="array"):
        meta.array = np.arange(4)


def test_metadata_copies_and_pickles():
    meta = Metadata(name="n").set(a=1)
    for other in (copy.copy(meta), copy.deepcopy(meta), pickle.loads(pickle.dumps(meta))):
        assert other.as_dict() == meta.as_dict()
    assert Metadata().name == "N/A"


def test_empty_name():
    with pytest.raises(ValueError, match="name of a dataset"):
        MetadataCatalog.get("")


@pytest.mark.parametrize("touch", [MetadataCatalog.get, lambda n: n in DatasetCatalog])
def test_lazy_registration_happens_once_on_use(name, touch):
    calls = []

    def register(key):
        calls.append(key)
        DatasetCatalog.register(key, list)
        MetadataCatalog.get(key).set(x=1)

    register_on_use(["zz_lazy"], register)
    assert calls == []
    touch("zz_lazy")
    assert DatasetCatalog.get("zz_lazy") == []
    assert MetadataCatalog.get("zz_lazy").x == 1
    assert calls == ["zz_lazy"]


def test_import_registers_nothing(monkeypatch):
    monkeypatch.setattr(catalog, "_PENDING", {})
    monkeypatch.setattr(DatasetCatalog, "data", {})
    monkeypatch.setattr(MetadataCatalog, "data", {})
    importlib.reload(builtin)
    assert not DatasetCatalog.data
    assert not MetadataCatalog.data
    assert len(MetadataCatalog.get("coco_2017_val").thing_classes) == 80
    assert list(DatasetCatalog.data) == ["coco_2017_val"]
    assert "coco_2017_train" in DatasetCatalog.list()
    assert {"coco_2014_minival", "voc_2007_test", "lvis_v1_val"} <= set(DatasetCatalog.list())
    with pytest.raises(ValueError, match="already registered"):
        DatasetCatalog.register("coco_2017_val", list)
