"""Names of a model's classes, from its config or its datasets."""

import os
from typing import TYPE_CHECKING

from d2kit.config import CfgNode

if TYPE_CHECKING:
    from d2kit.data import Metadata

__all__ = ["build_class_names", "build_metadata"]


def build_metadata(cfg: CfgNode) -> "Metadata":
    """Return what is known of a model's classes without reading a dataset.

    It is the metadata of the first test set (without one: training set). Where these do not have
    the names of MODEL.CLASS_NAMES it is a copy that has them: the model knows its classes on a
    machine without its datasets.
    """
    from d2kit.data import Metadata, MetadataCatalog, register_datasets

    register_datasets(cfg.DATASETS.REGISTER_COCO)
    datasets = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
    metadata = MetadataCatalog.get(datasets[0] if datasets else "__unused")
    names = list(cfg.MODEL.CLASS_NAMES)
    if not names or names == metadata.get("thing_classes"):
        return metadata
    return Metadata(**{**metadata.as_dict(), "thing_classes": names})


def build_class_names(cfg: CfgNode) -> list[str]:
    """Return the names of a model's classes in the order of their ids.

    They come from MODEL.CLASS_NAMES, the metadata of the first test (or training) set, or its
    annotations, if they are there, or torchvision's list where the weights are torchvision's; else
    they are numbers, "0", "1", ...
    """
    from d2kit.data import DatasetCatalog
    from d2kit.modeling.facts import build_facts

    metadata = build_metadata(cfg)
    names, dataset = metadata.get("thing_classes"), metadata.name
    if (
        names is None
        and os.path.isfile(metadata.get("json_file") or "")
        and (dataset in DatasetCatalog)
    ):
        DatasetCatalog.get(dataset)  # a dataset of one's own tells its classes when it is read
        names = metadata.get("thing_classes")
    count = build_facts(cfg).num_classes or cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if names is None and cfg.MODEL.WEIGHTS.startswith("torchvision://"):
        from torchvision.models import detection, get_model_weights, list_models

        model = cfg.MODEL.WEIGHTS.removeprefix("torchvision://")
        if model in list_models(detection):
            [weights, *_] = get_model_weights(model)
            listed = weights.meta["categories"]
            # the first is the background, which only RetinaNet has as a class
            names = listed[-count:] if len(listed) - count in (0, 1) else None
    return list(names or map(str, range(count)))
