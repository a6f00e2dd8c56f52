"""Published weights from a local server against a small COCO."""

import functools
import http.server
import json
import pickle
import threading

import cv2
import numpy as np
import pytest
import torch

from d2kit import model_zoo
from d2kit.checkpoint.catalog import ZOO_URL
from d2kit.cli.weights import PUBLISHED, verify_zoo_main
from d2kit.data import MetadataCatalog
from d2kit.modeling import build_model

NAME = "COCO-Detection/faster_rcnn_R_50_FPN_1x"
SMALL = [
    "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "64", "MODEL.ROI_BOX_HEAD.FC_DIM", "16",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8",
    "MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.FPN.OUT_CHANNELS", "16",
    "DATALOADER.NUM_WORKERS", "0",
]  # fmt: skip


def test_every_published_model_has_weights():
    for name in PUBLISHED:
        assert model_zoo.get_checkpoint_url(name)


@pytest.fixture
def coco(tmp_path):
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    names = MetadataCatalog.get("coco_2017_val").thing_classes
    images, annotations = [], []
    for i in range(1, 4):
        picture = np.full((64, 80, 3), 30 * i, np.uint8)
        picture[10:40, 10:50] = 255
        cv2.imwrite(str(folder / f"val2017/{i}.jpg"), picture)
        images.append({"id": i, "file_name": f"{i}.jpg", "height": 64, "width": 80})
        box = {"bbox": [10, 10, 40, 30], "area": 1200, "iscrowd": 0}
        annotations.append({"id": i, "image_id": i, "category_id": 1, **box})
    categories = [{"id": i, "name": n} for i, n in enumerate(names, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    url = model_zoo.get_checkpoint_url(NAME)
    file = folder / url.removeprefix(ZOO_URL)
    file.parent.mkdir(parents=True)
    cfg = model_zoo.get_config(f"{NAME}.yaml")
    cfg.merge_from_list(SMALL)
    torch.manual_seed(0)
    state = {name: value.numpy() for name, value in build_model(cfg).state_dict().items()}
    file.write_bytes(pickle.dumps({"model": state, "__author__": "tests"}))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_models_are_fetched_evaluated_and_kept(coco, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("D2KIT_CACHE", str(tmp_path / "cache"))
    words = [NAME, "--data", str(coco), "--output", str(tmp_path / "out"), "--mirror", server]
    with pytest.raises(SystemExit) as end:
        verify_zoo_main([*words, "--opts", *SMALL])
    assert end.value.code == 1  # random weights do not reach the published AP
    kept = json.loads((tmp_path / "out/verify_zoo.json").read_text())[NAME]
    task = kept["tasks"]["bbox"]
    assert kept["verdict"] == "differs"
    assert task["published"] == 37.9
    assert 0 <= task["found"] < 37
    assert task["difference"] == pytest.approx(task["found"] - 37.9)
    assert "differs" in (tmp_path / "out/verify_zoo.md").read_text()
    assert "faster_rcnn_R_50_FPN_1x" in capsys.readouterr().out
    words[-1] = "http://127.0.0.1:9"  # nobody there: the result is kept, nothing is fetched
    with pytest.raises(SystemExit):
        verify_zoo_main([*words, "--opts", *SMALL])
    assert "differs" in capsys.readouterr().out


def test_a_wrong_name_lists_the_nearest(coco, capsys):
    with pytest.raises(SystemExit):
        verify_zoo_main(["COCO-Detection/faster_rcnn_R_50_FPN_2x", "--data", str(coco)])
    assert "faster_rcnn_R_50_FPN_1x" in capsys.readouterr().err
