import json

import pytest

from d2kit.data import DatasetCatalog, MetadataCatalog


def coco(**changes):
    """A sound COCO file: two images, two categories with gaps in the ids, all kinds of masks."""
    content = {
        "images": [
            {"id": 7, "file_name": "b.jpg", "height": 20, "width": 30},
            {"id": 3, "file_name": "a.jpg", "height": 40, "width": 20},
        ],
        "categories": [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 5,
                "bbox": [1, 2, 10, 8],
                "area": 80,
                "iscrowd": 0,
                "segmentation": [[1, 2, 11, 2, 11, 10, 1, 10]],
            },
            {
                "id": 2,
                "image_id": 7,
                "category_id": 2,
                "bbox": [0, 0, 2, 20],
                "area": 40,
                "iscrowd": 0,
                "segmentation": {"size": [20, 30], "counts": [0, 40, 560]},
            },
            {
                "id": 3,
                "image_id": 3,
                "category_id": 2,
                "bbox": [0, 0, 20, 40],
                "area": 800,
                "iscrowd": 1,
                "segmentation": {"size": [40, 20], "counts": "0Pi0"},
            },
        ],
    }
    content.update(changes)
    return content


@pytest.fixture
def write_coco(tmp_path):
    """Return a function that writes a COCO JSON file and gives its path."""

    def write(content=None, name="data.json"):
        path = tmp_path / name
        path.write_text(json.dumps(coco() if content is None else content))
        return path

    return write


@pytest.fixture
def names():
    """Return a function that gives fresh dataset names, removed from the catalogs at the end."""
    made = []

    def fresh(label=""):
        made.append(f"zz_data_test_{label}{len(made)}")
        return made[-1]

    yield fresh
    for name in made:
        DatasetCatalog.data.pop(name, None)
        MetadataCatalog.data.pop(name, None)
