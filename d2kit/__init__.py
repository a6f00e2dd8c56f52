"""d2kit: Detectron2's workflow after one ``pip install``.

Importing this package is cheap: nothing but the version is loaded until a subpackage is used, or
one of the shortcuts ``d2kit.Predictor``, ``d2kit.init_detector``, ``d2kit.inference_detector``,
``d2kit.show_result``, ``d2kit.train``.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

TYPE_CHECKING = False  # `typing` is half of the time of importing this package
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.2.0"

SHORTCUTS = {
    "Predictor": "d2kit.predict",
    "inference_detector": "d2kit.predict",
    "init_detector": "d2kit.predict",
    "register_dataset": "d2kit.data.datasets",
    "show_result": "d2kit.predict",
    "train": "d2kit.cli.train",
}
"""Name in this package -> the module that has it."""


RENAMED = {"projects": "contrib"}
"""First part of a module's path in Detectron2, below the package -> its name here."""

MOVED = {
    "config.compat": "config.config",
    "config.defaults": "config.config",
    "contrib.deeplab.build_solver": "contrib.deeplab.config",
    "contrib.deeplab.loss": "contrib.deeplab.semantic_seg",
    "contrib.deeplab.resnet": "contrib.deeplab.semantic_seg",
    "contrib.panoptic_deeplab.config": "contrib.panoptic_deeplab.panoptic_seg",
    "contrib.panoptic_deeplab.post_processing": "contrib.panoptic_deeplab.panoptic_seg",
    "contrib.panoptic_deeplab.target_generator": "contrib.panoptic_deeplab.dataset_mapper",
    "contrib.point_rend.color_augmentation": "data.transforms",
    "contrib.point_rend.config": "contrib.point_rend.point_head",
    "contrib.point_rend.point_features": "contrib.point_rend.point_head",
    "data.datasets.builtin_meta": "data.catalog",
    "data.datasets.lvis_v1_category_image_count": "data.datasets.lvis_v1_categories",
    "data.datasets.register_coco": "data.datasets.coco",
    "data.samplers.grouped_batch_sampler": "data.samplers.distributed_sampler",
    "engine.defaults": "engine",
    "engine.inference": "predict",
    "engine.train_loop": "engine",
    "evaluation.fast_eval_api": "evaluation.backend",
    "evaluation.panoptic_evaluation": "evaluation.sem_seg_evaluation",
    "evaluation.rotated_coco_evaluation": "evaluation.coco_evaluation",
    "evaluation.testing": "evaluation.evaluator",
    "export.torchscript": "export.flatten",
    "layers.aspp": "layers.blocks",
    "layers.deform_conv": "layers.blocks",
    "layers.roi_align_rotated": "layers.rotated_boxes",
    "layers.shape_spec": "layers.wrappers",
    "model_zoo.model_zoo": "model_zoo",
    "modeling.backbone.build": "modeling.backbone.backbone",
    "modeling.matcher": "modeling.box_regression",
    "modeling.meta_arch.semantic_seg": "modeling.meta_arch.panoptic_fpn",
    "modeling.proposal_generator.build": "modeling.proposal_generator.rpn",
    "modeling.proposal_generator.rrpn": "modeling.proposal_generator.rpn",
    "modeling.test_time_augmentation": "evaluation.test_time_augmentation",
    "solver.lr_scheduler": "solver.build",
    "tracking.base_tracker": "tracking.motion_trackers",
    "tracking.bbox_iou_tracker": "tracking.trackers",
    "tracking.hungarian_tracker": "tracking.trackers",
    "tracking.iou_weighted_hungarian_bbox_iou_tracker": "tracking.trackers",
    "tracking.utils": "tracking.trackers",
    "tracking.vanilla_hungarian_bbox_iou_tracker": "tracking.trackers",
    "utils.colormap": "visualization.visualizer",
    "utils.memory": "utils.devices",
    "utils.serialize": "utils.safe_pickle",
    "utils.torch_version_utils": "utils.env",
    "utils.tracing": "utils.devices",
    "utils.video_visualizer": "visualization.visualizer",
    "utils.visualizer": "visualization.visualizer",
    # public modules of d2kit 0.1
    "checkpoint.conversion": "checkpoint.c2_model_loading",
    "data.checking": "curate.checking",
    "data.conversion": "curate.conversion",
    "data.datasets.prepare": "data.datasets.coco_panoptic",
    "data.groups": "data.records",
    "data.leaks": "curate.splitting",
    "data.splitting": "curate.splitting",
    "engine.video": "video",
    "engine.video.association": "video.association",
    "engine.video.detections": "video.detections",
    "engine.video.frames": "video.video_file",
    "engine.video.outputs": "video.outputs",
    "engine.video.overlay": "video.overlay",
    "engine.video.plan": "video.plan",
    "engine.video.privacy": "video.privacy",
    "engine.video.run": "video.run",
    "engine.video.sources": "video.sources",
    "engine.video.video_file": "video.video_file",
    "evaluation.validation_loss": "engine.evaluate",
    "layers.fuse": "layers.blocks",
    "layers.weight_init": "layers.blocks",
    "modeling.backbone.timm_fpn": "modeling.backbone.builders",
    "modeling.freezing": "modeling.meta_arch.build",
    "modeling.roi_heads.point_rend": "contrib.point_rend.mask_head",
    "tracking.smoothing": "tracking.trackers",
    "utils.archives": "utils.file_io",
    "utils.class_frequency": "utils.registry",
    "utils.errors": "utils.names",
    "utils.event_storage": "utils.events",
    "utils.nested": "utils.names",
    "visualization.video_visualizer": "visualization.visualizer",
}
"""Module under which user code imports what is part of a larger file here -> that file."""


class _Moved:
    """Import hook: ``d2kit.OLD`` is the module ``d2kit.NEW`` itself (`RENAMED`, `MOVED`)."""

    def __init__(self, home: str) -> None:
        self.home = home

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return a spec that loads the module's file here; None if it has the name that it had."""
        top, _, place = name.partition(".")
        if top != __name__ or not place:
            return None
        first, dot, rest = place.partition(".")
        home = RENAMED.get(first, first) + dot + rest
        home = MOVED.get(home, home)
        loader: Any = _Moved(f"{top}.{home}")  # a Loader by its methods: importlib.abc costs time
        return ModuleSpec(name, loader) if home != place else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to Python: the module made is replaced in `exec_module`."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the file's module in the place of this one."""
        sys.modules[module.__name__] = importlib.import_module(self.home)


sys.meta_path.insert(0, _Moved)


def __getattr__(name: str) -> "Any":
    """Load a shortcut when it is first used."""
    if name not in SHORTCUTS:
        raise AttributeError(f"module 'd2kit' has no attribute '{name}'")
    return getattr(importlib.import_module(SHORTCUTS[name]), name)


def __dir__() -> list[str]:
    """List the shortcuts too."""
    return sorted([*globals(), *SHORTCUTS])
