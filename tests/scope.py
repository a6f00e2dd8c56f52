"""Which of Detectron2's public names are not there yet, or not meant to be, and why."""

_LATER = {
    "Python configs": """
        config.lazy config.LazyConfig config.LazyCall config.instantiate""",
    "the model zoo, export, trackers and projects": """
        model_zoo export utils.analysis.TracingAdapter tracking projects""",
    "measuring of loaders": "data.benchmark",
    "datasets other than COCO's instances": """
        data.datasets.cityscapes data.datasets.lvis data.datasets.lvis_v0_5_categories
        data.datasets.lvis_v1_categories data.datasets.lvis_v1_category_image_count
        data.datasets.register_lvis_instances data.datasets.get_lvis_instances_meta
        data.datasets.load_lvis_json data.datasets.load_voc_instances data.datasets.pascal_voc
        data.datasets.register_pascal_voc data.datasets.register_coco_panoptic
        data.datasets.register_coco_panoptic_separated data.datasets.coco_panoptic
        data.datasets.builtin data.datasets.builtin_meta.CITYSCAPES_CATEGORIES
        data.detection_utils.get_fed_loss_cls_weights data.build._build_weighted_sampler""",
    "evaluators other than COCO's instances": """
        evaluation.lvis_evaluation evaluation.LVISEvaluator
        evaluation.cityscapes_evaluation evaluation.CityscapesEvaluator
        evaluation.CityscapesInstanceEvaluator evaluation.CityscapesSemSegEvaluator
        evaluation.pascal_voc_evaluation evaluation.PascalVOCDetectionEvaluator
        evaluation.rotated_coco_evaluation evaluation.RotatedCOCOEvaluator
        evaluation.panoptic_evaluation evaluation.COCOPanopticEvaluator
        evaluation.sem_seg_evaluation evaluation.SemSegEvaluator""",
    "keypoint, cascade, semantic, panoptic and one-stage models": """
        modeling.roi_heads.keypoint_head modeling.roi_heads.KRCNNConvDeconvUpsampleHead
        modeling.roi_heads.cascade_rcnn modeling.roi_heads.CascadeROIHeads
        modeling.SEM_SEG_HEADS_REGISTRY modeling.build_sem_seg_head
        modeling.meta_arch.semantic_seg modeling.SemanticSegmentor
        modeling.meta_arch.panoptic_fpn modeling.PanopticFPN
        modeling.meta_arch.retinanet modeling.RetinaNet modeling.meta_arch.RetinaNet
        modeling.meta_arch.fcos modeling.meta_arch.dense_detector
        modeling.meta_arch.DenseDetector modeling.box_regression._dense_box_regression_loss
        layers.ASPP layers.aspp""",
    "transformers, Swin, RegNet, MMDetection's models": """
        modeling.backbone.swin modeling.SwinTransformer modeling.backbone.SwinTransformer
        modeling.backbone.vit modeling.ViT modeling.backbone.ViT modeling.SimpleFeaturePyramid
        modeling.backbone.SimpleFeaturePyramid modeling.backbone.get_vit_lr_decay_rate
        modeling.get_vit_lr_decay_rate modeling.backbone.mvit modeling.MViT
        modeling.backbone.MViT modeling.backbone.utils
        modeling.backbone.regnet modeling.backbone.RegNet modeling.mmdet_wrapper""",
    "test-time augmentation": """
        modeling.test_time_augmentation modeling.GeneralizedRCNNWithTTA
        modeling.DatasetMapperTTA""",
}
LATER = {f"d2kit.{name}": why for why, names in _LATER.items() for name in names.split()}
"""Dotted prefix -> the later piece of work that it belongs to."""

NEVER = {
    "d2kit.utils.collect_env.detect_compute_compatibility": "d2kit has no compiled extension",
    "d2kit.utils.collect_env.test_nccl_ops": "torch.distributed has its own tests of NCCL",
}
"""Dotted prefix -> why it is left out for good."""


def out_of_scope(path: str) -> str:
    """Return why a public path need not resolve, or an empty string."""
    for prefix, why in {**LATER, **NEVER}.items():
        if path == prefix or path.startswith(f"{prefix}."):
            return why
    return ""
