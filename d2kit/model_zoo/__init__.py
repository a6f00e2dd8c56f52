"""Configs, models and weights of Detectron2's model zoo by name."""

from d2kit.model_zoo.model_zoo import get, get_checkpoint_url, get_config, get_config_file

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]
