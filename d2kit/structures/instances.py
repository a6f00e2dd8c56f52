"""All instances of one image: a table whose columns have the same length."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from d2kit.utils.devices import is_symbolic, upload
from d2kit.utils.names import AssertedValueError, nearest_names

__all__ = ["Instances"]


class Instances:
    """Named fields (boxes, scores, masks, ...) of the instances of one image.

    A field is anything with a length that can be indexed by a slice, a bool mask and indices. Read
    and write fields as attributes; a name that begins with ``_`` is an ordinary attribute.

    Args:
        image_size: (height, width) in pixels.
        **kwargs: fields.
    """

    _image_size: tuple[int, int]
    _fields: dict[str, Any]

    def __init__(self, image_size: tuple[int, int], **kwargs: object) -> None:
        self._image_size = image_size
        self._fields = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self._image_size

    def __setattr__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self.set(name, value)

    def __getattr__(self, name: str) -> Any:
        # unpickling and deepcopy ask for attributes before there are fields
        fields = self.__dict__.get("_fields", {})
        if name in fields:
            return fields[name]
        near = nearest_names(name, fields)
        raise AttributeError(
            f"Instances has no field '{name}'; it has {sorted(fields)}"
            + (f", nearest: {', '.join(near)}" if near else "")
        )

    def set(self, name: str, value: Any) -> None:
        """Set field `name`.

        Raises:
            ValueError: if the length of `value` is not that of the other fields.
            AttributeError: if `name` is that of a method or property.
        """
        if hasattr(type(self), name):
            raise AttributeError(f"Instances: '{name}' is a method or property, not a field")
        others = any(other != name for other in self._fields)
        if others and not is_symbolic() and len(value) != len(self):
            raise AssertedValueError(
                f"Instances: field '{name}' has length {len(value)}, but the fields "
                f"{sorted(self._fields)} have length {len(self)}"
            )
        self._fields[name] = value

    def has(self, name: str) -> bool:
        """Tell whether there is a field `name`."""
        return name in self._fields

    def remove(self, name: str) -> None:
        """Remove field `name`; KeyError if there is none."""
        if name not in self._fields:
            raise KeyError(
                f"Instances has no field '{name}' to remove; it has {sorted(self._fields)}"
            )
        del self._fields[name]

    def get(self, name: str) -> Any:
        """Return field `name`; KeyError if there is none."""
        if name not in self._fields:
            raise KeyError(f"Instances has no field '{name}'; it has {sorted(self._fields)}")
        return self._fields[name]

    def get_fields(self) -> dict[str, Any]:
        """Return the dict of fields itself; changes to it change the instances."""
        return self._fields

    def to(self, *args: Any, **kwargs: object) -> "Instances":
        """Return a new object with `to(*args, **kwargs)` applied to every field that has it."""
        moved = Instances(self._image_size)
        only_device = len(args) == 1 and not kwargs and isinstance(args[0], torch.device)
        for name, value in self._fields.items():
            if only_device and isinstance(value, torch.Tensor):
                moved._fields[name] = upload(value, args[0])
                continue
            moved._fields[name] = value.to(*args, **kwargs) if hasattr(value, "to") else value
        return moved

    def __getitem__(self, item: Any) -> "Instances":
        """Select instances by an integer (gives one), a slice, a bool mask or indices."""
        if isinstance(item, int):
            if not -len(self) <= item < len(self):
                raise IndexError(
                    f"Instances: index {item} is out of range for {len(self)} instances"
                )
            item = slice(item % len(self), item % len(self) + 1)
        if _waits_as_index(item):
            if len(item) != len(self):
                raise IndexError(f"Instances: mask of length {len(item)} for {len(self)} instances")
            item = item.nonzero().squeeze(1)
        chosen = Instances(self._image_size)
        for name, value in self._fields.items():
            chosen._fields[name] = _select(value, item)
        return chosen

    def __len__(self) -> int:
        for value in self._fields.values():
            return len(value)
        raise NotImplementedError("Instances without fields have no length")

    def __iter__(self) -> Iterator["Instances"]:
        """Yield the instances one by one, each as an `Instances` of length 1."""
        for index in range(len(self)):
            yield self[index]

    @staticmethod
    def cat(instance_lists: Sequence["Instances"]) -> "Instances":
        """Concatenate instances of the same image with the same fields.

        Raises:
            ValueError: if the list is empty, or image sizes or fields differ.
            TypeError: if a field can not be concatenated.
        """
        if not instance_lists:
            raise AssertedValueError(
                "Instances.cat: expected at least one element, got an empty list"
            )
        first = instance_lists[0]
        if len(instance_lists) == 1:
            return first
        for other in instance_lists[1:]:
            if tuple(other.image_size) != tuple(first.image_size):
                raise AssertedValueError(
                    f"Instances.cat: image sizes differ: {first.image_size} and {other.image_size}"
                )
            if other._fields.keys() != first._fields.keys():
                raise AssertedValueError(
                    f"Instances.cat: fields differ: {sorted(first._fields)} and "
                    f"{sorted(other._fields)}"
                )
        joined = Instances(first.image_size)
        for name in first._fields:
            joined._fields[name] = _concatenate(name, [x._fields[name] for x in instance_lists])
        return joined

    def __str__(self) -> str:
        count = len(self) if self._fields else 0
        height, width = self._image_size
        fields = ", ".join(f"{name}: {value}" for name, value in self._fields.items())
        return (
            f"Instances(num_instances={count}, image_height={height}, image_width={width}, "
            f"fields=[{fields}])"
        )

    __repr__ = __str__


def _waits_as_index(item: Any) -> bool:
    """Tell whether an index is a mask on a device: each field would wait for its number of rows."""
    mask = isinstance(item, torch.Tensor) and item.dtype == torch.bool and item.dim() == 1
    return mask and item.device.type != "cpu" and not is_symbolic()


def _select(value: Any, item: Any) -> Any:
    """Index one field; a list accepts a mask or indices too."""
    if not isinstance(value, list) or isinstance(item, slice):
        return value[item]
    index = torch.as_tensor(item)
    if index.dtype == torch.bool:
        index = index.nonzero().flatten()
    return [value[i] for i in index.tolist()]


def _concatenate(name: str, values: list[Any]) -> Any:
    """Concatenate one field by its type."""
    kind = type(values[0])
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values, dim=0)
    if kind is list:
        return list(itertools.chain.from_iterable(values))
    if hasattr(kind, "cat"):
        return kind.cat(values)
    raise TypeError(
        f"Instances.cat: field '{name}' of type {kind.__name__} can not be concatenated"
    )
