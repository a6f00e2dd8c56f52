"""Detectron2's place of questions about tracing."""

from d2kit.utils.devices import is_fx_tracing

__all__ = ["is_fx_tracing"]
