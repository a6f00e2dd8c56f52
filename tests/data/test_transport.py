"""What a worker cannot send is an error that names image, field and remedy, not a wait."""

import errno
import os
import sys
import threading

import pytest
import torch

from d2kit.data import build_detection_test_loader, build_detection_train_loader
from d2kit.data.loader import CANNOT_SEND, SHARED_MEMORY, cause_of, telling_context
from tests.support.fault_runs import patience

RECORDS = [
    {"file_name": f"{i}.jpg", "image_id": i, "width": 4, "height": 3, "annotations": []}
    for i in range(6)
]


class Unsendable(Exception):
    def __init__(self, lock):
        super().__init__("of a package that locks")
        self.lock = lock

    def __reduce__(self):
        raise TypeError("cannot pickle an Unsendable")


def with_lock(record):
    sample = {**record, "image": torch.zeros(2)}
    if record["image_id"] == 4:
        sample["own"] = threading.Lock()
    return sample


def with_generator(record):
    return {**record, "image": torch.zeros(2), "rest": (x for x in [1])}


def with_bad_exception(record):
    raise Unsendable(threading.Lock())


def sound(record):
    return {**record, "image": torch.full((2,), float(record["image_id"]))}


def loader(mapper, workers=1):
    return build_detection_train_loader(
        RECORDS, mapper=mapper, total_batch_size=2, num_workers=workers, seed=1
    )


def told_by(read):
    """Return the error of reading a loader, which may wait for ever instead."""
    told = []

    def look():
        try:
            read()
        except RuntimeError as error:
            told.append(str(error))

    reader = threading.Thread(target=look, daemon=True)
    reader.start()
    reader.join(patience(10))
    assert told, "no error: the loader waits"
    return told[0]


@pytest.mark.faults(35, fast=True)
@pytest.mark.parametrize(
    ("mapper", "words"),
    [
        (with_lock, [CANNOT_SEND, "field 'own' (lock) of", "4.jpg", "picklable", "NUM_WORKERS 0"]),
        (with_generator, [CANNOT_SEND, "field 'rest' (generator) of", ".jpg"]),
    ],
)
def test_a_field_that_cannot_be_sent_is_named(mapper, words):
    told = told_by(lambda: list(zip(range(6), loader(mapper), strict=False)))
    assert all(word in told for word in words), told


@pytest.mark.faults(35, fast=True)
def test_an_evaluation_names_what_cannot_be_sent():
    told = told_by(
        lambda: list(build_detection_test_loader(RECORDS, mapper=with_lock, num_workers=1))
    )
    assert all(word in told for word in (CANNOT_SEND, "field 'own' (lock) of", "4.jpg")), told


def ending(how):
    def mapper(record):
        if record["image_id"] == 4:
            how(3)
        return {**record, "image": torch.zeros(2)}

    return mapper


@pytest.mark.parametrize("build", ["train", "test"])
@pytest.mark.parametrize(
    ("how", "words"), [(sys.exit, "sys.exit(3)"), (os._exit, "left with exit code 3")]
)
def test_a_mapper_that_ends_its_worker_is_told(build, how, words):
    if build == "train":
        batches = zip(range(6), loader(ending(how)), strict=False)
    else:
        batches = build_detection_test_loader(RECORDS, mapper=ending(how), num_workers=1)
    with pytest.raises(RuntimeError) as error:
        list(batches)
    assert words in str(error.value)
    assert "4.jpg" in str(error.value)
    assert "killed" not in str(error.value)


def test_a_test_loader_has_the_dataset_of_before():
    found = build_detection_test_loader(RECORDS, mapper=sound, num_workers=1)
    assert len(found.dataset) == 6
    assert found.dataset.record(4)["file_name"] == "4.jpg"
    assert [batch[0]["image_id"] for batch in found] == list(range(6))
    with pytest.raises(AttributeError):
        found.dataset.nonsense  # noqa: B018


def test_an_exception_without_text_names_its_image():
    class Silent(Exception):
        def __str__(self):
            raise ValueError("no text")

    def mapper(record):
        raise Silent

    with pytest.raises(RuntimeError, match=r"\d\.jpg': Silent: \(its text cannot be made\)"):
        next(iter(loader(mapper, 0)))


def test_an_exception_that_cannot_be_sent_is_told_as_it_is():
    with pytest.raises(Exception, match=r"of a package that locks") as error:
        next(iter(loader(with_bad_exception)))
    assert "memory is full" not in str(error.value)


def test_sound_samples_pass_unchanged():
    batches = [next(iter(loader(sound, workers))) for workers in (0, 1)]
    assert [s["image"].tolist() for s in batches[0]] == [s["image"].tolist() for s in batches[1]]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EMFILE, "x"), "ulimit -n"),
        (RuntimeError("Too many open files. Communication with the workers"), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (OSError(errno.ENOSPC, "x"), SHARED_MEMORY),
        (RuntimeError("unable to allocate shared memory(shm)"), SHARED_MEMORY),
        (TypeError("cannot pickle '_thread.lock' object"), "picklable"),
    ],
)
def test_the_remedy_fits_the_cause(error, said):
    assert said in cause_of(error)


@pytest.mark.parametrize("given", [None, "fork", "spawn"])
def test_a_context_keeps_its_start_method(given):
    context = telling_context(given)
    assert given in (None, context.get_start_method())
    queue = context.Queue()
    queue.put((0, "passes"))
    assert queue.get(timeout=30) == (0, "passes")
