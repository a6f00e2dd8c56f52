"""Patients in hospital-room video: the embedded synthetic ward and its datasets."""

from project.patient_video.dataset import TEST, TRAIN, WardSpec, generate, register
from project.patient_video.ward import CLASS_NAMES, WardVideo

__all__ = ["CLASS_NAMES", "TEST", "TRAIN", "WardSpec", "WardVideo", "generate", "register"]
