"""A small Pascal VOC folder."""

import numpy as np

CLASSES = ("cat", "dog", "cow", "rare", "absent")
SIZE = 120, 160


def xml(objects, size=SIZE):
    """Return an annotation file; objects: (name, [xmin, ymin, xmax, ymax] from 1, difficult)."""
    text = "".join(
        f"<object><name>{name}</name><difficult>{int(difficult)}</difficult>"
        "<bndbox>"
        + "".join(
            f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        + "</bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
        for name, box, difficult in objects
    )
    return (
        f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth>"
        f"</size>{text}</annotation>"
    )


def boxes(rng, count):
    low = rng.integers(1, [SIZE[1] - 20, SIZE[0] - 20], (count, 2))
    high = np.minimum(low + rng.integers(4, 60, (count, 2)), [SIZE[1], SIZE[0]])
    return np.concatenate([low, high], axis=1)


def make(root, seed=0, images=8):
    """Write annotations and the split "test"; return {image id: [(name, box, difficult)]}."""
    rng = np.random.default_rng(seed)
    truths = {}
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for number in range(images):
        count = 0 if number == 2 else rng.integers(1, 8)
        names = rng.choice(CLASSES[:3], count) if number else ["rare", "cat", "cat"]
        found = boxes(rng, len(names))
        truths[f"{number:06d}"] = [
            (str(n), b.tolist(), bool(rng.random() < 0.2))
            for n, b in zip(names, found, strict=True)
        ]
        (root / f"Annotations/{number:06d}.xml").write_text(xml(truths[f"{number:06d}"]))
    (root / "ImageSets/Main/test.txt").write_text("\n".join(truths) + "\n")
    return truths
