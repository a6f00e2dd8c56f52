"""AP by group: the whole equals a plain evaluation, the intervals those of a slow bootstrap."""

import hotcoco
import numpy as np
import pytest

from d2kit.evaluation.groups import OVERALL, ap_by_group, table_of_groups


def scene(videos=4, frames=12, seed=0):
    rng = np.random.default_rng(seed)
    images, annotations, results = [], [], []
    for v in range(videos):
        for f in range(frames):
            image_id = 1 + v * frames + f
            entry = {"id": image_id, "file_name": f"v{v}/{f}.jpg", "width": 100, "height": 100}
            images.append({**entry, "video_id": v})
            for _ in range(rng.integers(1, 4)):
                x, y, w, h = *rng.uniform(0, 50, 2), *rng.uniform(15, 40, 2)
                common = {"image_id": image_id, "category_id": int(rng.integers(1, 3))}
                box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
                annotations.append({"id": len(annotations) + 1, **common, **box})
                spread = 1 + 2 * v  # the later the video, the worse the detector
                guess = (np.array([x, y, w, h]) + rng.normal(0, spread, 4)).tolist()
                results.append({**common, "bbox": guess, "score": float(rng.random())})
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def plain_ap(truth, results, draws):
    """AP of a dataset with the drawn images, drawn ones repeated under new ids."""
    images, annotations, found = [], [], []
    for new, old in enumerate(draws, start=1):
        images.append({**next(i for i in truth["images"] if i["id"] == old), "id": new})
        annotations += [
            {**a, "image_id": new, "id": len(annotations) + 1 + i}
            for i, a in enumerate(a for a in truth["annotations"] if a["image_id"] == old)
        ]
        found += [{**r, "image_id": new} for r in results if r["image_id"] == old]
    coco = hotcoco.COCO(
        {"images": images, "annotations": annotations, "categories": truth["categories"]}
    )
    evaluation = hotcoco.COCOeval(coco, coco.load_res(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return 100 * evaluation.stats[0]


def test_figures_are_those_of_plain_evaluations():
    truth, results = scene()
    figures = ap_by_group(truth, results, samples=200)
    assert list(figures) == ["0", "1", "2", "3", OVERALL]
    for v in range(4):
        ids = [im["id"] for im in truth["images"] if im["video_id"] == v]
        assert figures[str(v)]["AP"] == pytest.approx(plain_ap(truth, results, ids), abs=1e-9)
    everything = [im["id"] for im in truth["images"]]
    assert figures[OVERALL]["AP"] == pytest.approx(plain_ap(truth, results, everything), abs=1e-9)
    for group in figures.values():
        assert group["low"] < group["AP"] < group["high"]
    assert figures[OVERALL]["high"] - figures[OVERALL]["low"] > 10, "videos differ"
    text = table_of_groups(figures)
    assert f"{figures['0']['AP']:.1f}" in text


def test_intervals_are_those_of_drawing_images_again():
    truth, results = scene(videos=1, frames=10)
    figures = ap_by_group(truth, results, samples=300, seed=1)["0"]
    rng = np.random.default_rng(7)
    ids = [im["id"] for im in truth["images"]]
    slow = [plain_ap(truth, results, rng.choice(ids, len(ids))) for _ in range(300)]
    low, high = np.percentile(slow, [2.5, 97.5])
    assert figures["low"] == pytest.approx(low, abs=3)
    assert figures["high"] == pytest.approx(high, abs=3)


def test_one_group_has_no_interval_over_groups():
    truth, results = scene(videos=1)
    figures = ap_by_group(truth, results, samples=20)
    assert np.isnan(figures[OVERALL]["low"])
    assert figures[OVERALL]["AP"] == figures["0"]["AP"]
