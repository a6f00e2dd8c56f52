"""From the kind of a dataset to the evaluators that its figures come from."""

import os
from typing import Any

from d2kit.config import CfgNode
from d2kit.utils.registry import nearest_names

__all__ = ["build_dataset_evaluator"]


def build_dataset_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str | None = None) -> Any:
    """Build what evaluates a dataset, by the `evaluator_type` in its metadata.

    Args:
        cfg: the config; a model of rotated boxes is evaluated by rotated boxes.
        dataset_name: a registered dataset.
        output_dir: where the evaluators write; default: ``inference`` in OUTPUT_DIR.

    Returns:
        One evaluator, or `DatasetEvaluators` of several (panoptic datasets).

    Raises:
        ValueError: the metadata name no evaluator that d2kit knows.
    """
    from d2kit import evaluation
    from d2kit.data import MetadataCatalog

    folder = os.path.join(cfg.OUTPUT_DIR, "inference") if output_dir is None else output_dir
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.get("evaluator_type")
    if kind is None and metadata.get("thing_classes") is not None:
        kind = "coco"
    if kind == "coco" and cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RRPN":
        kind = "rotated_coco"

    def coco() -> Any:
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
        return evaluation.COCOEvaluator(dataset_name, output_dir=folder, kpt_oks_sigmas=sigmas)

    def panoptic() -> Any:
        parts: list[Any] = [evaluation.COCOPanopticEvaluator(dataset_name, folder)]
        if metadata.get("sem_seg_root"):
            parts.insert(0, evaluation.SemSegEvaluator(dataset_name, output_dir=folder))
        if metadata.get("json_file"):
            parts.insert(0, coco())
        return evaluation.DatasetEvaluators(parts) if len(parts) > 1 else parts[0]

    makers = {
        "coco": coco,
        "rotated_coco": lambda: evaluation.RotatedCOCOEvaluator(dataset_name, output_dir=folder),
        "coco_panoptic_seg": panoptic,
        "sem_seg": lambda: evaluation.SemSegEvaluator(dataset_name, output_dir=folder),
        "cityscapes_instance": lambda: evaluation.CityscapesInstanceEvaluator(dataset_name),
        "cityscapes_sem_seg": lambda: evaluation.CityscapesSemSegEvaluator(dataset_name),
        "pascal_voc": lambda: evaluation.PascalVOCDetectionEvaluator(dataset_name),
        "lvis": lambda: evaluation.LVISEvaluator(dataset_name, output_dir=folder),
    }
    if kind not in makers:
        near = ", ".join(nearest_names(str(kind), makers) or makers)
        raise ValueError(
            f"no evaluator is known for dataset '{dataset_name}' (evaluator_type {kind!r}; nearest "
            f"{near}); set it in the metadata, or override DefaultTrainer.build_evaluator"
        )
    evaluator = makers[kind]()
    if cfg.TEST.CLASSIFICATION_REPORT:
        report = evaluation.ClassificationReport(dataset_name, output_dir=folder)
        return evaluation.DatasetEvaluators([evaluator, report])
    return evaluator
