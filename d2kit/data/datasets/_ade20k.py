"""The 150 classes of ADE20K's scene parsing, taken from the list that comes with the images."""

import os

from d2kit.data.datasets._validate import DatasetError

__all__ = ["ade20k_classes"]


def ade20k_classes(root: str) -> list[str]:
    """Return the class names in the order of their indices.

    Args:
        root: folder "ADEChallengeData2016" with ``objectInfo150.txt``: a head line, then per class
            columns between tabs; the first is the number from 1, the last the synonyms.

    Returns:
        The first synonym of each class; all of them where another class has the same first.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: it has another form.
    """
    path = os.path.join(root, "objectInfo150.txt")
    names = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(filter(None, map(str.strip, list(file)[1:])), start=1):
            cells = [cell.strip() for cell in line.split("\t")]
            if len(cells) < 2 or cells[0] != str(number) or not cells[-1]:
                raise DatasetError(
                    f"{path}: line {number + 1}: expected class {number}, ..., its names between "
                    f"tabs, got {line[:60]!r}"
                )
            names.append(cells[-1])
    first = [name.split(",")[0].strip() for name in names]
    return [
        short if first.count(short) == 1 else name for short, name in zip(first, names, strict=True)
    ]
