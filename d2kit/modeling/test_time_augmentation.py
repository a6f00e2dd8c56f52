"""Test-time augmentation, where user code imports it."""

from d2kit.evaluation.test_time_augmentation import DatasetMapperTTA, GeneralizedRCNNWithTTA

__all__ = ["DatasetMapperTTA", "GeneralizedRCNNWithTTA"]
