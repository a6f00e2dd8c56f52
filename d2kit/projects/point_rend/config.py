"""The keys of PointRend."""

from d2kit.config._pointrend import add_pointrend_config

__all__ = ["add_pointrend_config"]
