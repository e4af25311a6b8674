"""Tensors out of pickled modules, from files built by hand as PyTorch builds them; nothing in them may run."""

import collections
import pickle

import numpy as np
import pytest

from taskvec.io import torch_modules
from taskvec.io.torch_checkpoint import Forbidden, load_state_dict
from taskvec.io.torch_modules import load_module
from tests.io.torch_files_for_tests import (
    WRITERS,
    Call,
    Global,
    Pickler,
    Storage,
    evil,
    tensor,
    write_legacy,
    write_zip,
)

NUMBERS = np.arange(6, dtype=np.float32)


class Object:
    """Pickles as an object of class ``module.name`` made without arguments, with a state."""

    def __init__(self, kind, state):
        self.kind, self.state = kind, state


class Source:
    """Pickles as PyTorch before 1.6 pickles a class of modules: with its source."""

    def __init__(self, kind):
        self.pid = ("module", kind, "modeling.py", "import os; os.system('false')")


@pytest.fixture(autouse=True)
def objects(monkeypatch):
    """Teaches the pickler `Object` and `Source`."""
    plain, plain_id = Pickler.save, Pickler.persistent_id

    def save(self, obj, save_persistent_id=True):
        if not isinstance(obj, Object):
            return plain(self, obj, save_persistent_id)
        self.save(obj.kind)
        self.save(())
        self.write(pickle.NEWOBJ)
        self.save(obj.state)
        return self.write(pickle.BUILD)

    monkeypatch.setattr(Pickler, "save", save)
    monkeypatch.setattr(Pickler, "persistent_id", lambda self, x: x.pid if isinstance(x, Source) else plain_id(self, x))


def weight(offset=0, key="0"):
    return tensor(Storage("FloatStorage", key, 6), offset, (2, 2), (2, 1))


def module(kind, parameters=(), buffers=(), modules=(), passing=(), **more):
    ordered = lambda items: Call(Global("collections", "OrderedDict"), [[k, v] for k, v in dict(items).items()])
    fields = {"_parameters": ordered(parameters), "_buffers": ordered(buffers), "_modules": ordered(modules)}
    gone = Call(Global("__builtin__", "set"), list(passing))
    return Object(kind, {**fields, "_non_persistent_buffers_set": gone, "training": False, **more})


def example(wrap=lambda kind: kind):
    linear = lambda at: module(wrap(Global("torch.nn.modules.linear", "Linear")), {"weight": weight(at), "bias": None})
    preprocess = Call(Global("torchvision.transforms", "Compose"), [Call(Global("open_clip.transform", "_to_rgb"))])
    inner = module(
        wrap(Global("open_clip.model", "CLIP")),
        {"scale": weight(1)},
        {"mask": weight(2), "count": weight(0)},
        {"first": linear(0), "none": None, "second": linear(2)},
        ["mask"],
        activation=Global("torch.nn.functional", "gelu"),
    )
    return module(wrap(Global("src.modeling", "ImageEncoder")), modules={"model": inner}, val_preprocess=preprocess)


WANTED = {"model.scale": 1, "model.count": 0, "model.first.weight": 0, "model.second.weight": 2}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_pickled_module(tmp_path, kind):
    wrap = Source if kind == "legacy" else lambda kind: kind
    WRITERS[kind](tmp_path / "x.pt", example(wrap), {"0": NUMBERS})
    found = load_module(tmp_path / "x.pt")
    assert list(found) == list(WANTED)
    for name, offset in WANTED.items():
        np.testing.assert_array_equal(found[name], NUMBERS[offset : offset + 4].reshape(2, 2))
    with pytest.raises((Forbidden, ValueError)):
        load_state_dict(tmp_path / "x.pt")


@pytest.mark.parametrize("kind", WRITERS)
def test_state_dicts_alone_and_wrapped(tmp_path, kind):
    plain = {"weight": weight(), "model_name": "ViT-B-32"}
    adam = Call(Global("torch.optim.adam", "Adam"))
    for table in (
        plain,
        {"epoch": 3, "optimizer": {"a": weight()}, "state_dict": plain},
        {"optimizer": adam, "model": plain},
    ):
        WRITERS[kind](tmp_path / "x.pt", table, {"0": NUMBERS})
        assert list(load_module(tmp_path / "x.pt")) == ["weight"]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("number", range(7))
def test_code_does_not_run(tmp_path, kind, number):
    marker = tmp_path / "ran"
    call = evil(marker)[number]
    hidden = module(Global("a", "B"), {"weight": weight()}, modules={"child": call}, extra=[call, {"x": call}])
    WRITERS[kind](tmp_path / "x.pt", hidden, {"0": NUMBERS})
    assert list(load_module(tmp_path / "x.pt")) == ["weight"]
    WRITERS[kind](tmp_path / "x.pt", Object(call, {"_parameters": {}}), {"0": NUMBERS})
    with pytest.raises(ValueError, match=r"x\.pt"):
        load_module(tmp_path / "x.pt")
    assert not marker.exists()


def test_real_objects_with_reduce_do_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    write_zip(tmp_path / "x.pt", {"weight": weight(), "evil": Evil()}, {"0": NUMBERS})
    assert list(load_module(tmp_path / "x.pt")) == ["weight"]
    assert not (tmp_path / "ran").exists()


def test_states_that_are_not_a_modules(tmp_path):
    """Whatever stands where a module keeps its parts, the answer is tensors or a ValueError."""
    kind = Global("a", "B")
    for state in ({}, [1], None, {"_modules": 3}, {"_modules": {"a": 3}}, {"_parameters": {"w": 3}, "_modules": {}}):
        write_zip(tmp_path / "x.pt", Object(kind, state), {"0": NUMBERS})
        with pytest.raises(ValueError, match=r"x\.pt holds no tensors"):
            load_module(tmp_path / "x.pt")
    for table in (kind, 3, [weight()], {"model": {"a": 1}}, {}):
        write_zip(tmp_path / "x.pt", table, {"0": NUMBERS})
        with pytest.raises(ValueError, match=r"x\.pt holds no tensors"):
            load_module(tmp_path / "x.pt")


def test_modules_nested_in_themselves():
    itself = torch_modules.Inert()
    itself.state = {"_modules": {"a": itself, "b": itself}}
    with pytest.raises(torch_modules.Odd, match="nested in themselves, or too many"):
        torch_modules._tensors(itself)


def test_damage_is_told_as_for_state_dicts(tmp_path):
    bad = module(Global("a", "B"), {"w": tensor(Storage("FloatStorage", "0", 24), 0, (24,), (1,))})
    write_zip(tmp_path / "x.pt", bad, {"0": NUMBERS})
    with pytest.raises(ValueError, match="announces 24 numbers"):
        load_module(tmp_path / "x.pt")
    write_legacy(tmp_path / "x.pt", example(), collections.OrderedDict({"0": NUMBERS}))
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[:-10])
    with pytest.raises(ValueError, match=r"x\.pt"):
        load_module(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError):
        load_module(tmp_path / "nowhere.pt")
