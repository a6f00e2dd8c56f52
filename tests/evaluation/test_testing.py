import pytest

from d2kit.config import get_cfg
from d2kit.evaluation import print_csv_format, verify_results
from d2kit.evaluation.evaluator import flatten_results_dict

RESULTS = {"bbox": {"AP": 38.04, "AP50": 60.0, "AP-person": 50.0}, "segm": {"AP": float("nan")}}


def config(*rows):
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = [list(row) for row in rows]
    return cfg


def test_csv(caplog):
    with caplog.at_level("INFO", logger="d2kit"):
        print_csv_format({**RESULTS, "speed": 3})
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "copypaste: Task: bbox",
        "copypaste: AP,AP50",
        "copypaste: 38.0400,60.0000",
        "copypaste: Task: segm",
        "copypaste: AP",
        "copypaste: nan",
        "copypaste: speed=3",
    ]


def test_csv_of_no_dict():
    with pytest.raises(TypeError, match="list"):
        print_csv_format([1])


@pytest.mark.parametrize("rows", [[], [("bbox", "AP", 38.0, 0.05)], [("bbox", "AP50", 60, 0)]])
def test_verified(rows):
    assert verify_results(config(*rows), RESULTS) is True


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("bbox", "AP", 38.0, 0.03), "38.04"),
        (("segm", "AP", 38.0, 100), "nan"),
        (("box", "AP", 38.0, 1), "bbox"),
        (("bbox", "AP5", 38.0, 1), "AP50"),
        (("bbox", "AP", 38.0), "tolerance"),
    ],
)
def test_not_verified(row, message, caplog):
    with pytest.raises(SystemExit) as stop:
        verify_results(config(("bbox", "AP50", 60, 1), row), RESULTS)
    assert stop.value.code == 1
    assert message in caplog.text


def test_flatten():
    nested = {"bbox": {"AP": 1.0, "by": {"size": 2.0}}, "speed": 3}
    assert flatten_results_dict(nested) == {"bbox/AP": 1.0, "bbox/by/size": 2.0, "speed": 3}
