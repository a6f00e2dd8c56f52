"""The package itself: its version and its shortcuts."""

import re

import pytest

import d2kit
from d2kit.data.datasets import register_dataset


def test_version_is_semantic():
    assert re.fullmatch(r"\d+\.\d+\.\d+", d2kit.__version__)


def test_shortcuts():
    assert d2kit.register_dataset is register_dataset
    with pytest.raises(AttributeError, match="'register_datasets'"):
        d2kit.register_datasets  # noqa: B018
