"""`register_coco_instances` at the second path under which programs import it."""

from d2kit.data.datasets.coco import register_coco_instances

__all__ = ["register_coco_instances"]
