"""A small city: ground truth and predictions in Cityscapes' layout."""

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 96, 160
THINGS = (24, 25, 26, 27, 28, 31, 32, 33)
STUFF = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23)
VOID = (0, 1, 3, 4, 5, 9, 10, 14)


def _box(rng, smallest, largest):
    x, y = rng.integers(0, WIDTH - smallest), rng.integers(0, HEIGHT - smallest)
    w, h = rng.integers(smallest, largest, 2)
    return slice(y, y + h), slice(x, x + w)


def truth(rng, things=12):
    """Return instance ids: stuff, void, instances of few classes, groups, small instances."""
    ids = np.zeros((HEIGHT, WIDTH), np.int32)
    for _ in range(12):
        ids[_box(rng, 8, 80)] = rng.choice(STUFF if rng.random() < 0.8 else VOID)
    for number in range(things):
        label = int(rng.choice(THINGS[:4] if rng.random() < 0.8 else [29, 30, 33, 24]))
        ids[_box(rng, 4, 40)] = label if rng.random() < 0.15 else label * 1000 + number
    return ids


def labels_of(ids):
    return np.where(ids < 1000, ids, ids // 1000)


def predictions(rng, ids, count=25):
    """Return masks, tied scores and label ids; most near an instance, some empty."""
    masks, labels = [], []
    instances = [value for value in np.unique(ids) if value >= 24]
    for _ in range(count):
        if instances and rng.random() < 0.75:
            value = rng.choice(instances)
            mask = np.roll(ids == value, rng.integers(-3, 4, 2), axis=(0, 1))
            label = value if value < 1000 else value // 1000
            label = label if label in THINGS and rng.random() < 0.9 else rng.choice(THINGS)
        else:
            mask = np.zeros(ids.shape, bool)
            mask[_box(rng, 4, 40)] = rng.random() < 0.9
            label = rng.choice(THINGS[:5])
        masks.append(mask)
        labels.append(int(label))
    return np.array(masks).reshape(-1, *ids.shape), rng.integers(0, 12, count) / 10, labels


def write(root, ids, name, split="val", city="aachen"):
    """Write image and ground truth of one picture; return the path of the image."""
    images, truths = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
    images.mkdir(parents=True, exist_ok=True)
    truths.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*ids.shape, 3), np.uint8)).save(images / f"{name}_leftImg8bit.png")
    Image.fromarray(ids.astype(np.uint16)).save(truths / f"{name}_gtFine_instanceIds.png")
    labels = labels_of(ids).astype(np.uint8)
    Image.fromarray(labels).save(truths / f"{name}_gtFine_labelIds.png")
    return images / f"{name}_leftImg8bit.png"
