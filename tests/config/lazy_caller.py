"""Code that loads a config that lies beside it."""

from d2kit.config import LazyConfig


def load(filename, keys=None):
    return LazyConfig.load_rel(filename, keys)
