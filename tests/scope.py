"""Which of Detectron2's public names are not there yet, or not meant to be, and why."""

_LATER_MODULES = {
    "Python configs": "config.lazy config.instantiate",
    "the model zoo, export and projects": "model_zoo export projects",
    "measuring of loaders": "data.benchmark",
    "datasets other than COCO's instances": """
        data.datasets.lvis data.datasets.lvis_v0_5_categories
        data.datasets.lvis_v1_categories data.datasets.lvis_v1_category_image_count""",
    "evaluation of rotated boxes": "evaluation.rotated_coco_evaluation",
    "rotated, semantic, panoptic and one-stage models": """
        modeling.meta_arch.semantic_seg modeling.meta_arch.panoptic_fpn
        modeling.meta_arch.retinanet modeling.meta_arch.fcos
        modeling.meta_arch.dense_detector""",
    "MMDetection's models": "modeling.mmdet_wrapper",
    "test-time augmentation": "modeling.test_time_augmentation",
}
_LATER_NAMES = {
    "Python configs": "LazyConfig LazyCall",
    "export": "TracingAdapter",
    "datasets other than COCO's instances": """
        register_lvis_instances get_lvis_instances_meta load_lvis_json
        register_coco_panoptic register_coco_panoptic_separated
        _build_weighted_sampler""",
    "evaluation of rotated boxes": "RotatedCOCOEvaluator",
    "rotated, semantic, panoptic and one-stage models": """
        RROIHeads SEM_SEG_HEADS_REGISTRY build_sem_seg_head
        SemSegFPNHead SemanticSegmentor PanopticFPN RetinaNet FCOS DenseDetector""",
    "MMDetection's models": "MMDetBackbone MMDetDetector",
    "test-time augmentation": "GeneralizedRCNNWithTTA DatasetMapperTTA",
}
LATER_MODULES = {f"d2kit.{m}": why for why, text in _LATER_MODULES.items() for m in text.split()}
"""Module -> the later piece of work that it belongs to."""
LATER_NAMES = {name: why for why, text in _LATER_NAMES.items() for name in text.split()}
"""Name, in whatever module -> the later piece of work that it belongs to."""

NEVER = {
    "detect_compute_compatibility": "d2kit has no compiled extension",
    "test_nccl_ops": "torch.distributed has its own tests of NCCL",
}
"""Name -> why it is left out for good."""


def out_of_scope(path: str) -> str:
    """Return why a public path need not resolve, or an empty string."""
    for module, why in LATER_MODULES.items():
        if path == module or path.startswith(f"{module}."):
            return why
    names = {**LATER_NAMES, **NEVER}
    return next((names[part] for part in path.split(".") if part in names), "")
