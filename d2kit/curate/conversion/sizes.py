"""Images of annotations that do not say how large they are."""

from __future__ import annotations

from collections.abc import Iterable

from d2kit.curate.conversion.common import CocoBuilder
from d2kit.curate.conversion.foreign import ImageFinder
from d2kit.curate.findings import ImageFile, survey_images


class SizedImages:
    """Adds images to a builder with the sizes of their files; those without a file are counted.

    Args:
        builder: of the dataset.
        finder: of its images.
    """

    def __init__(self, builder: CocoBuilder, finder: ImageFinder) -> None:
        self.builder = builder
        self.finder = finder
        self._files: dict[str, ImageFile] = {}
        self._names: dict[str, str | None] = {}
        self._ids: dict[str, int] = {}

    def survey(self, given: Iterable[str]) -> None:
        """Find and decode the images that annotations name."""
        near = self.builder.source.parent
        self._names = {name: self.finder.find(name, near) for name in dict.fromkeys(given)}
        known = [{"file_name": name} for name in self._names.values() if name]
        self._files = survey_images(known, self.finder.root)

    def id(self, given: str) -> int | None:
        """Return the id of an image; None where its file is missing or damaged."""
        name = self._names[given]
        if name is None or self._files[name].problem:
            if given not in self._ids:
                self._ids[given] = -1
                what = "was not found" if name is None else "cannot be read"
                self.builder.lost[f"images whose file {what} (left out)"] += 1
            return None
        if name not in self._ids:
            file = self._files[name]
            self._ids[name] = self.builder.image(name, file.width, file.height)
        return self._ids[name]
