"""Pedestrians: fine-tuning and training from scratch on the Penn-Fudan database."""

from project.pennfudan.dataset import CLASS_NAMES, TEST, TRAIN, download, prepare, register

__all__ = ["CLASS_NAMES", "TEST", "TRAIN", "download", "prepare", "register"]
