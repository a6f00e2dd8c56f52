import numpy as np
import pytest

from d2kit.config import get_cfg
from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.data.build import _build_weighted_sampler, build_train_sampler

NAMES = ["zz_weighted_a", "zz_weighted_b"]


def records(categories):
    return [
        {"file_name": f"{i}.jpg", "image_id": i, "height": 4, "width": 4, "annotations": held}
        for i, held in enumerate(
            [{"category_id": c, "iscrowd": 0} for c in row] for row in categories
        )
    ]


@pytest.fixture
def cfg():
    # the last image of the second has no annotation and is filtered out
    sets = {NAMES[0]: [[0], [0], [0], [0, 1]], NAMES[1]: [[0], [0], []]}
    for name, rows in sets.items():
        DatasetCatalog.register(name, lambda rows=rows: records(rows))
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = tuple(NAMES)
    yield cfg
    for name in NAMES:
        DatasetCatalog.remove(name)
        MetadataCatalog.data.pop(name, None)


def counts(sampler, epochs=200):
    stream = sampler.epochs()
    drawn = np.concatenate([next(stream) for _ in range(epochs)])
    return np.bincount(drawn) / epochs


def test_datasets_are_repeated_by_their_factor(cfg):
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [(NAMES[1], 2.5)]
    got = counts(_build_weighted_sampler(cfg, seed=1))
    assert got[:4].tolist() == [1, 1, 1, 1]
    assert len(got) == 6
    assert got[4:] == pytest.approx([2.5, 2.5], abs=0.15)
    assert counts(_build_weighted_sampler(get_with(cfg, []))).tolist() == [1] * 6


def get_with(cfg, factors):
    cfg = cfg.clone()
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = factors
    return cfg


def test_categories_are_balanced_within_each_dataset(cfg):
    cfg.DATALOADER.REPEAT_THRESHOLD = 1.0  # the rare category is in a quarter of the images
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [(NAMES[0], 3.0), (NAMES[1], 3.0)]
    got = counts(_build_weighted_sampler(cfg, enable_category_balance=True, seed=2))
    assert got.tolist() == [1, 1, 1, 2, 1, 1]


def test_by_name_in_the_config(cfg):
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [(NAMES[0], 2.0)]
    cfg.DATALOADER.SAMPLER_TRAIN = "WeightedTrainingSampler"
    got = counts(build_train_sampler(cfg, [None] * 6, seed=3))
    assert got.tolist() == [2, 2, 2, 2, 1, 1]
    cfg.DATALOADER.SAMPLER_TRAIN = "WeightedCategoryTrainingSampler"
    assert len(counts(build_train_sampler(cfg, [None] * 6, seed=3))) == 6
    cfg.DATALOADER.SAMPLER_TRAIN = "WeightedSampler"
    with pytest.raises(ValueError, match="nearest: WeightedTrainingSampler"):
        build_train_sampler(cfg, [None] * 6, seed=3)


def test_factor_of_an_unknown_dataset(cfg):
    with pytest.raises(ValueError, match="names zz_other, but DATASETS.TRAIN is zz_weighted_a"):
        _build_weighted_sampler(get_with(cfg, [("zz_other", 2.0)]))
