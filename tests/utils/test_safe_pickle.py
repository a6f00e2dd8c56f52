import collections
import io
import os
import pickle

import numpy as np
import pytest

from d2kit.utils.safe_pickle import SafeUnpickler, load_pickle


def load(data, **kwargs):
    return SafeUnpickler(io.BytesIO(data), **kwargs).load()


def same(a, b):
    if isinstance(b, np.ndarray) and b.dtype == object:
        return all(same(x, y) for x, y in zip(a.ravel(), b.ravel(), strict=True))
    if isinstance(b, np.ndarray):
        return (
            type(a) is np.ndarray
            and a.dtype == b.dtype
            and a.flags.f_contiguous == b.flags.f_contiguous
            and np.array_equal(a, b)
        )
    if isinstance(b, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in b)
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


PLAIN = [
    {"a": [1, 2.5, None, True], "b": ("x", b"y"), 3: {1, 2}, "c": frozenset([1]), "z": 1 + 2j},
    collections.OrderedDict(w=np.arange(6, dtype=np.float32).reshape(2, 3)),
    {"model": {"w": np.zeros((0, 4)), "s": np.float64(2.5), "i": np.int64(7)}},
    [np.asfortranarray(np.arange(6).reshape(2, 3)), np.arange(3, dtype=">i4"), np.array("text")],
    [
        np.array([True, False]),
        np.array(["a", "bc"]),
        np.array([b"a"]),
        np.array(1.5),
        bytearray(b"q"),
    ],
    {"boxes": np.array([np.ones((2, 4)), np.ones((1, 4)), None], dtype=object)},
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", PLAIN)
def test_plain_data_survive(value, protocol):
    assert same(load(pickle.dumps(value, protocol)), value)


def test_shared_and_cyclic_parts_stay_shared():
    array, cycle = np.ones(3), []
    cycle.append(cycle)
    out = load(pickle.dumps({"a": array, "b": array, "c": cycle}))
    assert out["a"] is out["b"]
    assert out["c"][0] is out["c"]
    out["a"][0] = 5  # writable


class Gadget:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class _Custom:
    pass


def _build(name, state):
    """Pickle that sets attributes of global `name`: GLOBAL, state, BUILD."""
    return b"c" + name + b"\n" + pickle.dumps(state, 0)[:-1] + b"b."


HOSTILE = {
    "system": pickle.dumps(Gadget(os.system, "touch /tmp/d2kit_pwned")),
    "eval": pickle.dumps(Gadget(eval, "1+1")),
    "getattr": pickle.dumps(Gadget(getattr, 1, "real")),
    "custom class": pickle.dumps(_Custom()),
    "np.load": pickle.dumps(Gadget(np.load, "/tmp/x")),
    "dotted": b"cnumpy\ncore.multiarray._reconstruct\n.",
    "function changed": _build(b"_codecs\nencode", {"x": 1}),
    "function slots changed": _build(b"_codecs\nencode", (None, {"__doc__": "x"})),
    "persistent id": b"Pabc\n.",
    "truncated": pickle.dumps([1, 2, 3])[:-2],
    "empty": b"",
    "text": b"<html>",
    "structured dtype": pickle.dumps(np.zeros(2, dtype=[("a", "i4")])),
    "wrong length": pickle.dumps(np.zeros(4, np.uint8)).replace(b"K\x04\x85", b"K\x09\x85"),
    "huge bytearray": b"cbuiltins\nbytearray\n(I1000000000000\ntR.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_is_refused(name):
    with pytest.raises(ValueError, match="pickle") as caught:
        load(HOSTILE[name])
    assert len(str(caught.value).splitlines()) == 1


def test_nothing_is_executed_and_global_is_named(tmp_path):
    marker = tmp_path / "ran"
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps(Gadget(os.system, f"touch {marker}")))
    with pytest.raises(ValueError, match=r"bad\.pkl.*posix\.system"):
        load_pickle(path)
    assert not marker.exists()


def test_extra_globals():
    data = pickle.dumps(Gadget(abs, -3))
    assert load(data, extra_globals={("builtins", "abs"): abs}) == 3


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_pickle(tmp_path / "none.pkl")
