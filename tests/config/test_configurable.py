import pytest

from d2kit.config import CfgNode, configurable


class Plain:
    @configurable
    def __init__(self, a, b=2, c=3):
        self.values = (a, b, c)

    @classmethod
    def from_config(cls, cfg):
        return {"a": cfg.A, "b": cfg.B}


class WithArguments:
    @configurable
    def __init__(self, a, b=2, *, extra=None):
        self.values = (a, b, extra)

    @classmethod
    def from_config(cls, cfg, shape, b=0):
        return {"a": (cfg.A, shape), "b": b + 1}


class TakesAll(Plain):
    @classmethod
    def from_config(cls, cfg, **kwargs):
        return {**super().from_config(cfg), "c": sorted(kwargs)}


class Child(Plain):
    def __init__(self, cfg, **kwargs):
        super().__init__(cfg, **kwargs)
        self.child = True


class GrandConfigurable(Plain):
    @configurable
    def __init__(self, d, **kwargs):
        super().__init__(**kwargs)
        self.d = d

    @classmethod
    def from_config(cls, cfg):
        return {"d": 4, **super().from_config(cfg)}


CFG = CfgNode({"A": 10, "B": 20})


@pytest.mark.parametrize(
    ("made", "values"),
    [
        (lambda: Plain(1), (1, 2, 3)),
        (lambda: Plain(a=1, c=5), (1, 2, 5)),
        (lambda: Plain(CFG), (10, 20, 3)),
        (lambda: Plain(cfg=CFG), (10, 20, 3)),
        (lambda: Plain(CFG, c=9), (10, 20, 9)),
        (lambda: Plain(CFG, b=9), (10, 9, 3)),
        (lambda: WithArguments(CFG, "s"), ((10, "s"), 1, None)),
        (lambda: WithArguments(CFG, shape="s", b=5), ((10, "s"), 6, None)),
        (lambda: WithArguments(CFG, "s", extra=7), ((10, "s"), 1, 7)),
        (lambda: TakesAll(CFG, c=1, z=2), (10, 20, ["c", "z"])),
        (lambda: Child(CFG, c=1), (10, 20, 1)),
        (lambda: GrandConfigurable(CFG), (10, 20, 3)),
        (lambda: GrandConfigurable(d=1, a=2), (2, 2, 3)),
    ],
)
def test_constructors(made, values):
    assert made().values == values


def test_omegaconf_configs():
    omegaconf = pytest.importorskip("omegaconf")
    assert Plain(omegaconf.OmegaConf.create({"A": 1, "B": 2})).values == (1, 2, 3)


@configurable(from_config=lambda cfg, a=1: {"a": a, "b": cfg.B})
def function(a, b=2, c=3):
    return (a, b, c)


def test_functions():
    assert function(5) == (5, 2, 3)
    assert function(CFG) == (1, 20, 3)
    assert function(CFG, a=7, c=8) == (7, 20, 8)
    assert function.from_config(CFG) == {"a": 1, "b": 20}
    assert function.__name__ == "function"


def test_mistakes():
    class NoFromConfig:
        @configurable
        def __init__(self, a):
            self.a = a

    class NotClassMethod:
        @configurable
        def __init__(self, a):
            self.a = a

        def from_config(self, cfg):
            return {"a": 1}

    class WrongFirst(Plain):
        @classmethod
        def from_config(cls, x):
            return {"a": 1}

    class NotDict(Plain):
        @classmethod
        def from_config(cls, cfg):
            return [1]

    assert NoFromConfig(3).a == 3
    with pytest.raises(AttributeError, match="from_config"):
        NoFromConfig(CFG)
    with pytest.raises(TypeError, match="classmethod"):
        NotClassMethod(CFG)
    with pytest.raises(TypeError, match="first argument"):
        WrongFirst(CFG)
    with pytest.raises(TypeError, match="dict"):
        NotDict(CFG)
    with pytest.raises(TypeError, match="__init__"):
        configurable(lambda: 1)
    with pytest.raises(TypeError, match="function"):
        configurable(from_config=3)
