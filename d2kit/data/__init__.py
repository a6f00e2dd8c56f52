"""Data: catalogs of datasets, mappers, augmentations, samplers and loaders."""

from d2kit.data import datasets, samplers, transforms
from d2kit.data.build import (
    build_batch_data_loader,
    build_detection_test_loader,
    build_detection_train_loader,
    check_dataset_matches,
    get_detection_dataset_dicts,
    load_proposals_into_dataset,
    print_instances_class_histogram,
)
from d2kit.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from d2kit.data.common import (
    AspectRatioGroupedDataset,
    DatasetFromList,
    MapDataset,
    SampleError,
    ToIterableDataset,
)
from d2kit.data.dataset_mapper import DatasetMapper
from d2kit.data.datasets.builtin import register_datasets
from d2kit.data.datasets.coco import register_dataset
from d2kit.data.datasets.validate import DatasetError

__all__ = [
    "AspectRatioGroupedDataset",
    "DatasetCatalog",
    "DatasetError",
    "DatasetFromList",
    "DatasetMapper",
    "MapDataset",
    "Metadata",
    "MetadataCatalog",
    "SampleError",
    "ToIterableDataset",
    "build_batch_data_loader",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "check_dataset_matches",
    "get_detection_dataset_dicts",
    "load_proposals_into_dataset",
    "print_instances_class_histogram",
    "register_dataset",
    "register_datasets",
]
