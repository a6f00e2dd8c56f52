"""PQ against the published rule, written out naively (panopticapi is not on PyPI)."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from d2kit.data.catalog import MetadataCatalog
from d2kit.evaluation import COCOPanopticEvaluator
from d2kit.evaluation.sem_seg_evaluation import id_to_rgb

NAME = "zz_panoptic_evaluation"
HEIGHT, WIDTH = 60, 80
CATEGORIES = [
    {"id": 5 * i + 1, "name": f"class {i}", "isthing": int(i < 3)}
    for i in range(6)  # the last never occurs in the ground truth
]
THINGS = [c["id"] for c in CATEGORIES if c["isthing"]]


def segments(rng, count, categories, crowd):
    """Draw boxes over each other: id image and list of the segments that can be seen."""
    ids = np.zeros((HEIGHT, WIDTH), np.int64)
    kinds = {}
    for number in range(count):
        x, y, w, h = *rng.integers(0, [WIDTH - 5, HEIGHT - 5]), *rng.integers(3, 40, 2)
        segment = int(rng.integers(1, 256**3)) if number else 256**3 - 1
        ids[y : y + h, x : x + w] = segment
        kinds[segment] = int(rng.choice(categories))
    found = []
    for value in filter(None, np.unique(ids).tolist()):
        category = kinds[value]
        # COCO has one crowd of a class in an image at most, and panopticapi counts on that
        taken = any(s["iscrowd"] and s["category_id"] == category for s in found)
        is_crowd = category in THINGS and not taken and rng.random() < crowd
        entry = {"id": value, "category_id": category, "iscrowd": int(is_crowd)}
        found.append({**entry, "area": int((ids == value).sum()), "bbox": [0, 0, 1, 1]})
    return ids, found


def make(root, seed, images=4):
    """Write ground truth; return [(file name, image id, ids, segments)] of predictions."""
    rng = np.random.default_rng(seed)
    (root / "truth").mkdir()
    known = [c["id"] for c in CATEGORIES]
    truth = {"images": [], "categories": CATEGORIES, "annotations": []}
    predictions = []
    for number in range(images):
        ids, found = segments(rng, 0 if number == 1 else 14, known[:-1], 0.15)
        entry = {"id": 7 * number, "height": HEIGHT, "width": WIDTH, "file_name": f"{number}.jpg"}
        truth["images"].append(entry)
        Image.fromarray(id_to_rgb(ids)).save(root / f"truth/{number}.png")
        truth["annotations"].append(
            {"image_id": 7 * number, "file_name": f"{number}.png", "segments_info": found}
        )
        if number == 2:
            guess = (np.zeros_like(ids), [])
        else:
            guess = np.roll(ids, rng.integers(-3, 4, 2), (0, 1)), [dict(s) for s in found]
            for segment in guess[1]:
                if rng.random() < 0.15:
                    segment["category_id"] = int(rng.choice(known))
        predictions.append((f"some/folder/{number}.jpg", 7 * number, *guess))
    (root / "truth.json").write_text(json.dumps(truth))
    return predictions, truth


@pytest.fixture
def root(tmp_path):
    things = {c["id"]: i for i, c in enumerate(CATEGORIES) if c["isthing"]}
    stuff = {c["id"]: i for i, c in enumerate(CATEGORIES) if not c["isthing"]}
    MetadataCatalog.get(NAME).set(
        panoptic_json=str(tmp_path / "truth.json"),
        panoptic_root=str(tmp_path / "truth"),
        thing_dataset_id_to_contiguous_id=things,
        stuff_dataset_id_to_contiguous_id=stuff,
        label_divisor=1000,
    )
    yield tmp_path
    MetadataCatalog.remove(NAME)


def output(ids, found):
    to_index = {c["id"]: i for i, c in enumerate(CATEGORIES)}
    infos = [
        {
            "id": s["id"],
            "category_id": to_index[s["category_id"]],
            "isthing": s["category_id"] in THINGS,
        }
        for s in found
    ]
    return {"panoptic_seg": (torch.as_tensor(ids), infos)}


def ours(predictions, output_dir=None):
    evaluator = COCOPanopticEvaluator(NAME, output_dir)
    for file, image_id, ids, found in predictions:
        evaluator.process([{"file_name": file, "image_id": image_id}], [output(ids, found)])
    return evaluator.evaluate()["panoptic_seg"]


def naive(root, truth, predictions):
    """Kirillov et al. 2019, sections 4.1 and 4.2, pixel by pixel."""
    counts = {c["id"]: [0.0, 0, 0, 0] for c in CATEGORIES}  # sum of IoU, TP, FP, FN
    by_id = {image_id: (ids, found) for _, image_id, ids, found in predictions}
    for entry in truth["annotations"]:
        rgb = np.asarray(Image.open(root / "truth" / entry["file_name"])).astype(int)
        real = rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2]
        ids, found = by_id[entry["image_id"]]
        missed = {s["id"]: s for s in entry["segments_info"] if not s["iscrowd"]}
        for guess in found:
            mask = ids == guess["id"]
            matched = False
            for segment in entry["segments_info"]:
                other = real == segment["id"]
                if segment["category_id"] != guess["category_id"] or segment["iscrowd"]:
                    continue
                union = ((mask & (real != 0)) | other).sum()
                iou = (mask & other).sum() / union
                if iou > 0.5:
                    matched = True
                    counts[guess["category_id"]][0] += iou
                    counts[guess["category_id"]][1] += 1
                    del missed[segment["id"]]
            crowds = [
                s["id"]
                for s in entry["segments_info"]
                if s["iscrowd"] and s["category_id"] == guess["category_id"]
            ]
            ignored = np.isin(real[mask], [0, *crowds]).mean()
            if not matched and ignored <= 0.5:
                counts[guess["category_id"]][2] += 1
        for segment in missed.values():
            counts[segment["category_id"]][3] += 1
    figures = {}
    groups = {"": [c["id"] for c in CATEGORIES], "_th": THINGS}
    groups["_st"] = [c for c in groups[""] if c not in THINGS]
    for suffix, group in groups.items():
        rows = []
        for iou, tp, fp, fn in (counts[c] for c in group):
            if tp + fp + fn:
                sq = iou / tp if tp else 0
                rows.append((iou / (tp + fp / 2 + fn / 2), sq, tp / (tp + fp / 2 + fn / 2)))
        means = np.mean(rows, axis=0) * 100
        figures |= dict(zip((f"PQ{suffix}", f"SQ{suffix}", f"RQ{suffix}"), means, strict=True))
    return figures


@pytest.mark.parametrize("seed", range(6))
def test_quality_equals_the_published_rule(root, seed):
    predictions, truth = make(root, seed)
    got = ours(predictions)
    assert got == pytest.approx(naive(root, truth, predictions), abs=1e-9)
    assert 0 < got["PQ"] < 100


def test_perfect(root):
    predictions, truth = make(root, 1)
    for (_, _, ids, found), entry in zip(predictions, truth["annotations"], strict=True):
        rgb = np.asarray(Image.open(root / "truth" / entry["file_name"])).astype(np.int64)
        ids[:] = rgb @ [1, 256, 256**2]
        found[:] = entry["segments_info"]
    got = ours(predictions, str(root / "out"))
    assert got == dict.fromkeys(got, 100.0)
    kept = json.loads((root / "out/predictions.json").read_text())
    assert len(kept["annotations"]) == len(truth["annotations"])
    assert {s["category_id"] for a in kept["annotations"] for s in a["segments_info"]} <= {
        c["id"] for c in CATEGORIES
    }


def test_ids_that_hold_their_category(root):
    predictions, _ = make(root, 2)
    expected = ours(predictions)
    to_index = {c["id"]: i for i, c in enumerate(CATEGORIES)}
    evaluator = COCOPanopticEvaluator(NAME)
    for file, image_id, ids, found in predictions:
        coded = np.full(ids.shape, -1)
        for number, segment in enumerate(found):
            coded[ids == segment["id"]] = to_index[segment["category_id"]] * 1000 + number
        evaluator.process(
            [{"file_name": file, "image_id": image_id}],
            [{"panoptic_seg": (torch.as_tensor(coded), None)}],
        )
    assert evaluator.evaluate()["panoptic_seg"] == expected


def test_wrong_use_is_told(root):
    predictions, _ = make(root, 3)
    with pytest.raises(ValueError, match=r"truth\.json: no prediction for the image with id 21"):
        ours(predictions[:-1])  # an image without a prediction
    bad = {"id": 1, "category_id": 77, "isthing": True}
    with pytest.raises(ValueError, match="predicted thing class 77"):
        COCOPanopticEvaluator(NAME).process(
            [{"file_name": "a.jpg", "image_id": 0}],
            [{"panoptic_seg": (torch.zeros(2, 2, dtype=torch.int64), [bad])}],
        )
    with pytest.raises(ValueError, match="no panoptic_json, panoptic_root"):
        COCOPanopticEvaluator("zz_bare")
    MetadataCatalog.remove("zz_bare")
