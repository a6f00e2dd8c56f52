"""Random ground truth and detections with everything that makes COCO's figures differ."""

import numpy as np
from pycocotools import mask as mask_util

HEIGHT, WIDTH = 240, 320
KEYPOINTS = 17


def _rle(box):
    x, y, w, h = box
    outline = [x, y, x + w, y, x + 0.8 * w, y + h, x + 0.1 * w, y + 0.9 * h]
    rle = mask_util.frPyObjects([outline], HEIGHT, WIDTH)[0]
    return {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}


def _keypoints(rng, box, score):
    x, y, w, h = box
    points = np.stack([rng.uniform(x, x + w, KEYPOINTS), rng.uniform(y, y + h, KEYPOINTS)], axis=1)
    last = np.full((KEYPOINTS, 1), score) if score else rng.integers(0, 3, (KEYPOINTS, 1))
    return np.concatenate([points, last], axis=1)


def _truth(rng, image_id, categories):
    size = np.exp(rng.uniform(np.log(5), np.log(200), 2))  # small, medium and large
    corner = rng.uniform(0, [WIDTH - 10, HEIGHT - 10])
    size = np.minimum(size, [WIDTH - corner[0], HEIGHT - corner[1]])
    box = [round(float(v), 2) for v in (*corner, *size)]
    segmentation = _rle(box)
    points = _keypoints(rng, box, None)
    return {
        "image_id": image_id,
        "category_id": categories[rng.integers(len(categories))],
        "bbox": box,
        "area": float(mask_util.area(segmentation)),
        "iscrowd": int(rng.random() < 0.1),
        "segmentation": segmentation,
        "keypoints": points.ravel().tolist(),
        "num_keypoints": int((points[:, 2] > 0).sum()),
    }


def _detection(rng, image_id, truths, categories):
    if truths and rng.random() < 0.7:  # near a ground truth, sometimes of another class
        truth = truths[rng.integers(len(truths))]
        box = (np.array(truth["bbox"]) + rng.normal(0, 3, 4)).tolist()
        box[2:] = max(box[2], 1.0), max(box[3], 1.0)
        category = truth["category_id"]
        points = np.array(truth["keypoints"]).reshape(-1, 3)
        points[:, :2] += rng.normal(0, 2, (KEYPOINTS, 2))
    else:
        box = [*rng.uniform(0, [WIDTH - 10, HEIGHT - 10]), *rng.uniform(2, 100, 2)]
        category = categories[0]
        points = _keypoints(rng, box, 1)
    if rng.random() < 0.2:
        category = categories[rng.integers(len(categories))]
    points[:, 2] = 1
    return {
        "image_id": image_id,
        "category_id": category,
        "bbox": [float(v) for v in box],
        "score": float(np.round(rng.random(), 1 if rng.random() < 0.5 else 5)),  # many ties
        "segmentation": _rle(box),
        "keypoints": points.ravel().tolist(),
    }


def dataset(seed, images=24, classes=4, truths=12, detections=40):
    """Return COCO ground truth and results.

    Image ids and category ids have gaps; the last category has no ground truth; some images have
    neither, some no ground truth, some no detection.
    """
    rng = np.random.default_rng(seed)
    categories = [2 * c + 1 for c in range(classes)]
    truth = {
        "images": [
            {"id": 3 * i + 1, "height": HEIGHT, "width": WIDTH, "file_name": f"{i}.jpg"}
            for i in range(images)
        ],
        "categories": [{"id": c, "name": f"class {c}"} for c in categories],
        "annotations": [],
    }
    results = []
    for i, image in enumerate(truth["images"]):
        count = 0 if i % 7 == 3 else rng.integers(0, truths)
        with_truth = categories[:-1] or categories
        here = [_truth(rng, image["id"], with_truth) for _ in range(count)]
        truth["annotations"] += here
        if i % 11 != 5:
            count = rng.integers(0, detections)
            results += [_detection(rng, image["id"], here, categories) for _ in range(count)]
    for number, annotation in enumerate(truth["annotations"]):
        annotation["id"] = number + 1
    return truth, results
