import logging
import os

import pytest

from d2kit.utils import logger as module
from d2kit.utils.logger import (
    _log_api_usage,
    create_small_table,
    log_every_n,
    log_every_n_seconds,
    log_first_n,
    setup_logger,
)


@pytest.fixture
def name(request):
    unique = f"logger_of_{request.node.name}"
    yield unique
    for handler in logging.getLogger(unique).handlers[:]:
        logging.getLogger(unique).removeHandler(handler)
        handler.close()


def test_lines_on_terminal_and_in_file(name, tmp_path, capsys):
    setup_logger(str(tmp_path), name=name, abbrev_name="short")
    logging.getLogger(f"{name}.engine").info("hello")
    logging.getLogger(name).warning("careful")
    for text in (capsys.readouterr().out, (tmp_path / "log.txt").read_text()):
        first, second = text.splitlines()
        assert first.endswith("short.engine]: hello")
        assert second.startswith("WARNING [")
        assert second.endswith("short]: careful")
        assert "\033" not in text


def test_setup_is_idempotent(name, tmp_path, capsys):
    for _ in range(3):
        logger = setup_logger(str(tmp_path), name=name)
    setup_logger(name=name)
    setup_logger(str(tmp_path / "other.log"), name=name)
    logger.info("once")
    assert capsys.readouterr().out.count("once") == 1
    assert (tmp_path / "log.txt").read_text().count("once") == 1
    assert (tmp_path / "other.log").read_text().count("once") == 1
    assert len(logger.handlers) == 3


def test_other_ranks_write_their_own_file_only(name, tmp_path, capsys):
    setup_logger(str(tmp_path / "sub/log.txt"), distributed_rank=2, name=name).info("hi")
    assert capsys.readouterr().out == ""
    assert os.listdir(tmp_path / "sub") == ["log.txt.rank2"]


def test_a_log_that_cannot_be_opened_ends_nothing(name, tmp_path, capsys):
    (tmp_path / "log.txt").mkdir()
    setup_logger(str(tmp_path), name=name).info("on")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.txt")  # opening it would wait for a reader
        setup_logger(str(tmp_path / "pipe.txt"), name=name).info("and on")
    said = capsys.readouterr()
    assert "on" in said.out
    assert said.err.count("no log file") == 1 + hasattr(os, "mkfifo")


def test_options(name, capsys):
    logger = setup_logger(name=name, configure_stdout=False, enable_propagation=True)
    assert logger.propagate
    assert not logger.handlers
    assert setup_logger.__kwdefaults__["name"] == "d2kit"


def test_colour_on_a_terminal_only(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    setup_logger(name=name).error("bad")
    assert "\033[" in capsys.readouterr().out


def test_log_first_n(caplog):
    caplog.set_level(logging.INFO)
    for i in range(5):
        log_first_n(logging.INFO, f"caller {i}", n=2)
        log_first_n(logging.INFO, f"message {i % 2}", key="message")
        log_first_n(logging.INFO, f"both {i % 3}", key=("caller", "message"))
    assert [r.message for r in caplog.records] == [
        *("caller 0", "message 0", "both 0"),
        *("caller 1", "message 1", "both 1", "both 2"),
    ]
    assert {r.name for r in caplog.records} == {__name__}
    with pytest.raises(ValueError, match="key"):
        log_first_n(logging.INFO, "x", key="other")


def test_log_every_n(caplog):
    caplog.set_level(logging.INFO)
    for i in range(7):
        log_every_n(logging.INFO, f"{i}", n=3, name="other")
        log_every_n(logging.INFO, f"all {i}")
    assert [r.message for r in caplog.records if r.name == "other"] == ["0", "3", "6"]
    assert len(caplog.records) == 10


def test_log_every_n_seconds(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    times = iter([0.0, 1.0, 1.9, 2.1, 4.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    for i in range(5):
        log_every_n_seconds(logging.INFO, f"{i}", n=2)
    assert [r.message for r in caplog.records] == ["0", "3"]


def test_create_small_table():
    lines = create_small_table({"AP": 12.34567, "n": 3, "name": "x"}).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["AP", "n", "name"]
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["12.346", "3", "x"]


def test_api_usage_is_silent(capfd):
    _log_api_usage("test")
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_told_once_and_the_run_goes_on(tmp_path, capsys):
    from d2kit.utils.logger import setup_logger

    name = f"full_disk_{tmp_path.name}"
    logger = setup_logger(str(tmp_path), name=name, configure_stdout=False)
    (handler,) = logger.handlers
    sound, handler.stream = handler.stream, open("/dev/full", "w")  # noqa: PTH123, SIM115
    for _ in range(3):
        logger.info("lost")
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1
    assert str(tmp_path / "log.txt") in said
    assert "Traceback" not in said
    handler.stream = sound
    logger.info("there is room again")
    assert "room again" in (tmp_path / "log.txt").read_text()
    handler.close()
