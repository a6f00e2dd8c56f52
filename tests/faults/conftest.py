import logging

import pytest

from tests.support import tiny_run as tiny


@pytest.fixture
def folder(tmp_path):
    """A folder with the images of the tiny dataset, which is registered in this process too."""
    (tmp_path / "images").mkdir()
    tiny.register(tmp_path / "images")
    tiny.records(tmp_path / "images")
    return tmp_path


@pytest.fixture
def log(caplog):
    """What is logged from here on; d2kit's loggers do not hand on to the root's."""
    logger = logging.getLogger("d2kit")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
