import pytest
from fvcore.common.registry import Registry as FvcoreRegistry

from d2kit.utils.registry import Registry, locate, nearest_names


@pytest.mark.parametrize(
    ("name", "candidates", "expected"),
    [
        ("ResNet", ["resnet", "fpn", "vgg"], ["resnet"]),
        ("BASE_LRR", ["SOLVER.BASE_LR", "MODEL.MASK_ON"], ["SOLVER.BASE_LR"]),
        ("MODEL.BASE_LR", ["SOLVER.BASE_LR", "MODEL.RPN"], ["SOLVER.BASE_LR"]),
        ("xyz", ["resnet", "fpn"], []),
        ("a", [], []),
        ("abcd", ["abce", "abcf", "abcg", "abch"], ["abce", "abcf", "abcg"]),
        ("abcd", ["abcx", "abcd", "abcd"], ["abcd", "abcx"]),
    ],
)
def test_nearest_names(name, candidates, expected):
    assert nearest_names(name, candidates) == expected


def test_registry():
    registry = Registry("BACKBONE")
    assert isinstance(registry, FvcoreRegistry)

    @registry.register()
    def build_resnet():
        return 1

    registry.register(dict)
    assert registry.get("build_resnet") is build_resnet
    assert "dict" in registry
    assert [name for name, _ in registry] == ["build_resnet", "dict"]
    with pytest.raises(KeyError, match=r"BACKBONE.*nearest: build_resnet"):
        registry.get("build_resnett")
    with pytest.raises(KeyError, match=r"known: \['build_resnet', 'dict'\]"):
        registry.get("zzz")
    with pytest.raises(ValueError, match="already registered"):
        registry.register(dict)


def test_locate():
    import collections
    import os.path

    assert locate("collections.OrderedDict.fromkeys")({}) == collections.OrderedDict()
    assert locate("os.path") is os.path
    assert locate("d2kit.utils.registry.locate") is locate


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module.x", "no module 'no_such_module'"),
        ("d2kit.utils.registry.Regstry", "nearest.*Registry"),
        ("d2kit.utils.nothing_here", "not found"),
        ("os.system('ls')", "not a dotted"),
        ("", "not a dotted"),
    ],
)
def test_locate_nothing(name, words):
    with pytest.raises(ImportError, match=words):
        locate(name)


def test_locate_passes_on_errors_inside_modules(tmp_path, monkeypatch):
    (tmp_path / "broken_module_of_test.py").write_text("import module_that_is_missing_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="module_that_is_missing_there"):
        locate("broken_module_of_test.x")
