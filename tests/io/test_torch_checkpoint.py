"""PyTorch state dicts read without PyTorch, from files built by hand; and pickles that must not run."""

import collections
import os
import pickle
import zipfile

import numpy as np
import pytest

from taskvec.io.torch_checkpoint import Forbidden, load_numpy_pickle, load_state_dict
from tests.io.torch_files_for_tests import WRITERS, Call, Global, Storage, evil, example, pickled, tensor, write_zip


@pytest.mark.parametrize("kind", WRITERS)
def test_tensors_of_a_hand_made_file(tmp_path, kind):
    table, storages, expected = example(kind == "legacy")
    WRITERS[kind](tmp_path / "x.pth", table, storages)
    found = load_state_dict(tmp_path / "x.pth")
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        assert found[name].flags.c_contiguous
        assert found[name].flags.writeable
        np.testing.assert_array_equal(found[name], x, err_msg=name)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (5, 5), (5, 1)), (20, (5,), (1,)), (0, (2,), (24,)), (0, (10**12,), (0,)), (-1, (2,), (1,)), (0, (3,), (-1,))],
)
def test_tensors_that_reach_beyond_their_storage(tmp_path, kind, offset, shape, strides):
    storage = Storage("FloatStorage", "0", 24)
    table = {"bad": tensor(storage, offset, shape, strides)}
    WRITERS[kind](tmp_path / "x.pth", table, {"0": np.arange(24, dtype=np.float32)})
    with pytest.raises(ValueError, match=r"x\.pth.*(reach beyond|must be a whole number)"):
        load_state_dict(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_storage_smaller_than_announced_or_absent(tmp_path, kind):
    table = {"bad": tensor(Storage("FloatStorage", "0", 24), 0, (24,), (1,))}
    WRITERS[kind](tmp_path / "x.pth", table, {"0": np.arange(4, dtype=np.float32)})
    with pytest.raises(ValueError, match="announces 24 numbers"):
        load_state_dict(tmp_path / "x.pth")
    WRITERS[kind](tmp_path / "x.pth", table, {})
    with pytest.raises(ValueError, match=r"x\.pth"):
        load_state_dict(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.98])
def test_files_cut_short(tmp_path, kind, part):
    table, storages, _ = example(kind == "legacy")
    WRITERS[kind](tmp_path / "x.pth", table, storages)
    data = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match=r"x\.pth"):
        load_state_dict(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("number", range(7))
def test_code_is_refused_by_name_and_does_not_run(tmp_path, kind, number):
    marker = tmp_path / "ran"
    call = evil(marker)[number]
    WRITERS[kind](tmp_path / "x.pth", {"a": call}, {})
    with pytest.raises(Forbidden, match=rf"{call.function.module}\.{call.function.name}.*was not run"):
        load_state_dict(tmp_path / "x.pth")
    with pytest.raises(Forbidden, match=call.function.name):
        load_numpy_pickle(pickled(call))
    assert not marker.exists()


def test_an_object_with_reduce_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(Forbidden, match="system"):
            load_numpy_pickle(pickle.dumps(Evil(), protocol))
    assert not (tmp_path / "ran").exists()


def test_what_is_no_flat_state_dict(tmp_path):
    storage = tensor(Storage("FloatStorage", "0", 1), 0, (1,), (1,))
    write_zip(tmp_path / "x.pth", {"epoch": 3, "model": {"a": storage}}, {"0": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match="entries epoch, model are not tensors"):
        load_state_dict(tmp_path / "x.pth")
    write_zip(tmp_path / "x.pth", [storage], {"0": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match="holds a list"):
        load_state_dict(tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("word/document.xml", "")
    with pytest.raises(ValueError, match=r"zip archive without data\.pkl"):
        load_state_dict(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError):
        load_state_dict(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4", "f4", "f8", "?"])
def test_numpy_pickles(tmp_path, protocol, dtype):
    x = np.random.default_rng(0).integers(0, 2, (3, 4, 2)).astype(dtype)
    for array in (x, np.asfortranarray(x), x[:0], x[1, 1, 1:2].reshape(())):
        found = load_numpy_pickle(pickle.dumps(array, protocol))
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(x, 4))
    np.testing.assert_array_equal(load_numpy_pickle(tmp_path / "x.pkl"), x)


@pytest.mark.parametrize("thing", [[np.ones(2)], {"a": 1}, 3, "text", collections.OrderedDict()])
def test_pickles_of_other_things(thing):
    with pytest.raises((ValueError, Forbidden)):
        load_numpy_pickle(pickle.dumps(thing, 4))


@pytest.mark.parametrize(
    "array", [np.array([1, "a"], object), np.array(["a"]), np.zeros(2, "i4,f4"), np.ones(1, "M8[s]")]
)
def test_arrays_of_other_than_plain_numbers(array):
    with pytest.raises(ValueError, match=r"not one of plain numbers|not one pickled array"):
        load_numpy_pickle(pickle.dumps(array, 4))


def test_damaged_numpy_pickles():
    data = pickle.dumps(np.arange(100.0), 4)
    for part in (0, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match="not one pickled array"):
            load_numpy_pickle(data[:part])
    reconstruct, ndarray = Global("numpy.core.multiarray", "_reconstruct"), Global("numpy", "ndarray")
    with pytest.raises(ValueError, match="holds something else"):
        load_numpy_pickle(pickled(Call(reconstruct, ndarray, (0,), "b")))
