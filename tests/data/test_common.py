import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils import data as torchdata

from d2kit.data import AspectRatioGroupedDataset, DatasetFromList, MapDataset, ToIterableDataset
from d2kit.data.common import set_default_dataset_from_list_serialize_method


class Counting(torchdata.IterableDataset):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(range(self.n))

    def __len__(self):
        return self.n


@pytest.mark.parametrize("serialize", [True, False])
@pytest.mark.parametrize(
    "items", [[], [{"a": [1]}], [{"a": [i], "b": np.ones(i)} for i in range(9)]]
)
def test_list_behaves_like_a_list(items, serialize):
    dataset = DatasetFromList(items, serialize=serialize)
    assert len(dataset) == len(items)
    assert [d["a"] for d in dataset] == [d["a"] for d in items]
    for bad in (len(items), -len(items) - 1):
        with pytest.raises(IndexError, match="record"):
            dataset[bad]
    if items:
        assert dataset[-1]["a"] == items[-1]["a"]
        dataset[0]["a"].append(5)
        assert dataset[0]["a"] == items[0]["a"] == [items[0]["a"][0]]


def test_without_copy_gives_the_object_itself():
    items = [{"a": 1}]
    assert DatasetFromList(items, copy=False, serialize=False)[0] is items[0]


def test_other_serialisation():
    made = []

    def keep(items):
        made.append(items)
        return list(items)

    with set_default_dataset_from_list_serialize_method(keep):
        DatasetFromList([1, 2])
    DatasetFromList([1, 2])
    assert made == [[1, 2]]
    assert DatasetFromList([3], serialize=tuple)[0] == 3
    with pytest.raises(ValueError, match="expects a list"):
        DatasetFromList({"a": 1})


def test_aspect_groups():
    items = [{"width": 4, "height": 3}, {"width": 3, "height": 3}, {"width": 3, "height": 4}]
    assert DatasetFromList(items).aspect_groups.tolist() == [1, 0, 0]
    assert MapDataset(DatasetFromList(items), str).aspect_groups.tolist() == [1, 0, 0]
    assert DatasetFromList([*items, {}]).aspect_groups is None
    assert DatasetFromList([1]).aspect_groups is None


def test_map_replaces_none_deterministically():
    dataset = MapDataset(DatasetFromList(list(range(10))), lambda x: None if x % 2 else x)
    first = [dataset[i] for i in range(10)]
    random.seed(3)
    assert [dataset[i] for i in reversed(range(10))] == first[::-1]
    assert all(x % 2 == 0 for x in first)
    assert first[::2] == [0, 2, 4, 6, 8]
    with pytest.raises(RuntimeError, match="returned None"):
        MapDataset([{"file_name": "x.jpg"}], lambda x: None)[0]


def test_map_names_the_image():
    def broken(record):
        record.clear()
        raise KeyError("cannot")

    with pytest.raises(RuntimeError, match=r"record 0, file_name 'dir/x\.jpg': KeyError.*cannot"):
        MapDataset([{"file_name": "dir/x.jpg"}], broken)[0]


def test_map_of_iterable_leaves_out_none():
    dataset = MapDataset(Counting(6), lambda x: None if x % 2 else x)
    assert isinstance(dataset, torchdata.IterableDataset)
    assert list(dataset) == [0, 2, 4]
    assert len(dataset) == 6


def test_map_pickles():
    dataset = pickle.loads(pickle.dumps(MapDataset(DatasetFromList([1, -2]), abs)))
    assert [dataset[0], dataset[1]] == [1, 2]


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_to_iterable_shares_the_sampler(workers, chunk):
    dataset = ToIterableDataset(DatasetFromList(list(range(10, 20))), range(10), True, chunk)
    got = list(torchdata.DataLoader(dataset, batch_size=None, num_workers=workers))
    assert sorted(got) == list(range(10, 20))
    assert len(dataset) == 10
    with pytest.raises(ValueError, match="map-style"):
        ToIterableDataset(Counting(2), [0])


def test_aspect_ratio_grouping_of_samples():
    shapes = torch.randint(1, 9, (40, 2), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [{"width": w, "height": h, "i": i} for i, (w, h) in enumerate(shapes)]
    batches = list(AspectRatioGroupedDataset(samples, 4))
    assert all(len(b) == 4 and len({d["width"] > d["height"] for d in b}) == 1 for b in batches)
    wide = [d["i"] for b in batches for d in b if d["width"] > d["height"]]
    assert wide == [d["i"] for d in samples if d["width"] > d["height"]][: len(wide)]
    assert len(batches) >= 8
