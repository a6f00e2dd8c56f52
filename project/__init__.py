"""Experiments built on d2kit; ``register_all()`` makes their datasets known by name."""

from __future__ import annotations


def register_all(root: str | None = None) -> None:
    """Register the datasets of every experiment (files are read only when a dataset is used).

    Args:
        root: folder that holds the prepared datasets; by default ``$D2KIT_DATASETS`` or
            ``datasets/data``.
    """
    from project import cars, patient_video, pennfudan

    for experiment in (cars, patient_video, pennfudan):
        experiment.register(root)
