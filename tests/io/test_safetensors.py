"""Safetensors: streamed reading and writing, and every way a file can be wrong."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from taskvec.io.atomic import published, write_text
from taskvec.io.safetensors import SafetensorsReader, SafetensorsWriter, load, read_header, save


def tensors():
    rng = np.random.default_rng(0)
    return {
        "b/matrix": rng.normal(size=(5, 3)).astype(np.float32),
        "a.bf16": rng.normal(size=(4, 2)).astype(ml_dtypes.bfloat16),
        "half": rng.normal(size=7).astype(np.float16),
        "ids": np.arange(6, dtype=np.int64).reshape(1, 6),
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False, True]),
    }


def specs(some):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in some.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype
        np.testing.assert_array_equal(x, b[name], err_msg=name)


def sharded(folder):
    """Three shards of a few tensors."""
    with SafetensorsWriter(folder, specs(tensors()), max_shard_bytes=70) as writer:
        for name, x in tensors().items():
            writer.write(name, x)
    return sorted(folder.glob("*.safetensors"))


def test_round_trip_and_the_library_reads_it_too(tmp_path):
    save(tmp_path / "x.safetensors", tensors(), {"task": "a"})
    assert_same(load(tmp_path / "x.safetensors"), tensors())
    assert_same(safetensors.numpy.load_file(tmp_path / "x.safetensors"), tensors())
    reader = SafetensorsReader(tmp_path / "x.safetensors")
    assert reader.metadata == {"format": "pt", "task": "a"}
    assert reader.specs == specs(tensors())
    assert reader.path_of("half") == tmp_path / "x.safetensors"
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_reads_what_the_library_writes(tmp_path):
    safetensors.numpy.save_file(tensors(), tmp_path / "model.safetensors", {"a": "b"})
    assert_same(load(tmp_path), tensors())


def test_rows(tmp_path):
    save(tmp_path / "x.safetensors", tensors())
    reader = SafetensorsReader(tmp_path / "x.safetensors")
    for rows in (slice(1, 3), slice(None, 2), slice(4, None), slice(2, 2), slice(-2, None), slice(0, 99)):
        for name in ("b/matrix", "a.bf16", "empty", "half"):
            np.testing.assert_array_equal(reader.read(name, rows), tensors()[name][rows])


def test_shards_in_any_order_and_by_rows(tmp_path):
    with SafetensorsWriter(tmp_path, specs(tensors()), max_shard_bytes=70) as writer:
        for name, x in reversed(tensors().items()):
            if x.ndim == 2:
                writer.write(name, x[1:], slice(1, None))
                writer.write(name, x[:1], slice(0, 1)) if len(x) else None
            else:
                writer.write(name, x)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == [
        "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip
    assert_same(load(tmp_path), tensors())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors().values())
    for name, file in index["weight_map"].items():
        assert name in read_header(tmp_path / file)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    save(tmp_path / "model.safetensors", {"old": np.ones(2)})
    with pytest.raises(RuntimeError), SafetensorsWriter(tmp_path, specs(tensors())) as writer:
        writer.write("half", tensors()["half"])
        raise RuntimeError
    with (
        pytest.raises(ValueError, match="5 tensors were announced but not fully written"),
        SafetensorsWriter(tmp_path, specs(tensors())) as writer,
    ):
        writer.write("half", tensors()["half"])
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert load(tmp_path).keys() == {"old"}


def test_what_killed_processes_left_goes_and_what_others_write_stays(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        pid, own = other.pid, os.getpid()
        stays, goes = ["note", f"{pid}"], [f"{own}-1", "999999999", "999999999-5"]
        stat = pathlib.Path(f"/proc/{pid}/stat")
        if stat.exists():
            stays.append(f"{pid}-{stat.read_text().split()[21]}")
            goes.append(f"{pid}-1")  # another process had this number
        for name in [*stays, *goes]:
            (tmp_path / f".model.safetensors.{name}.tmp").write_text("")
        save(tmp_path, tensors())
        found = {path.name.split(".")[-2] for path in tmp_path.glob(".model.safetensors.*.tmp")}
        assert found == set(stays)
    finally:
        other.kill()
        other.wait()


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path):
    place, left = tmp_path / "m[1]", tmp_path / ".m[1].999999999.tmp"
    for folder in (place, left):
        folder.mkdir()
        (folder / "old").write_text("")
    with pytest.raises(RuntimeError), published(place) as partial:
        partial.mkdir()
        assert not left.exists() and (place / "old").exists()
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["m[1]"]
    with published(place) as partial:
        partial.mkdir()
        (partial / "new").write_text("")
    assert [p.name for p in tmp_path.rglob("*")] == ["m[1]", "new"]
    with pytest.raises(OSError):
        write_text(place, "a file does not replace a folder")
    assert [p.name for p in tmp_path.rglob("*")] == ["m[1]", "new"]


def test_writing_what_was_not_announced(tmp_path):
    x = np.ones((2, 2), np.float32)
    with SafetensorsWriter(tmp_path / "x.safetensors", specs({"a": x})) as writer:
        with pytest.raises(ValueError, match="b was not announced; announced were a"):
            writer.write("b", x)
        with pytest.raises(ValueError, match=r"float64\[2, 2\] but float32\[2, 2\] was announced"):
            writer.write("a", x.astype(np.float64))
        writer.write("a", x)
        with pytest.raises(ValueError, match="written twice"):
            writer.write("a", x)


def test_disk_space_is_asked_for_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 1_000_000_000))
    big = {"a": jax.ShapeDtypeStruct((10**9,), np.float32)}
    with pytest.raises(OSError, match=r"1\.00 GB free and the model needs 4\.00 GB"):
        SafetensorsWriter(tmp_path, big)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_another_layout_is_refused(tmp_path):
    save(tmp_path, {"old": np.ones(2)})
    with pytest.raises(FileExistsError, match=r"already holds model\.safetensors"):
        sharded(tmp_path)
    assert load(tmp_path).keys() == {"old"}


def test_unknown_dtype(tmp_path):
    with pytest.raises(ValueError, match=r"a \(complex128\)"):
        SafetensorsWriter(tmp_path, {"a": jax.ShapeDtypeStruct((1,), np.complex128)})


def test_missing_files_list_what_is_there(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin"):
            SafetensorsReader(path)
    with pytest.raises(KeyError, match="no tensor 'b'"):
        save(tmp_path / "x.safetensors", {"a": np.ones(1)})
        SafetensorsReader(tmp_path / "x.safetensors").read("b")


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_truncated_files(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save(path, tensors())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{path.name}.*cut short"):
        SafetensorsReader(path)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n" * 3, b"\x02" + b"\0" * 7 + b"[]"])
def test_files_that_are_something_else(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"no safetensors file|not that of a safetensors file"):
        SafetensorsReader(tmp_path / "x.safetensors")


def test_surplus_bytes(tmp_path):
    save(tmp_path / "x.safetensors", tensors())
    with open(tmp_path / "x.safetensors", "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="bytes left over"):
        SafetensorsReader(tmp_path / "x.safetensors")


def test_an_index_that_promises_too_much(tmp_path):
    first, *_ = sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = first.name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"promises tensors .*ghost \({first.name}\)"):
        SafetensorsReader(tmp_path)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=rf"names {first.name}, but the folder holds model-00002"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf(tmp_path, dtype, value):
    bad = np.array([1, value, 2, value]).astype(dtype)
    save(tmp_path / "x.safetensors", {"bad": bad, "ids": np.arange(3)})
    assert len(SafetensorsReader(tmp_path / "x.safetensors", check_finite=False).read("bad")) == 4
    reader = SafetensorsReader(tmp_path / "x.safetensors")
    reader.read("ids")
    with pytest.raises(ValueError, match=r"x\.safetensors: tensor bad holds NaN or infinity in 2 of 4 places"):
        reader.read("bad")


def test_arrays_are_read_only_and_taken_without_a_copy(tmp_path):
    """Tensors of odd sizes lie at any byte of the file; what is read starts where jax on a CPU shares memory."""
    save(tmp_path, {f"x{n}": np.arange(n, dtype=np.float16) for n in (3, 5, 1000)})
    reader = SafetensorsReader(tmp_path)
    for name in reader.specs:
        x = reader.read(name, slice(1, None))
        np.testing.assert_array_equal(x, np.arange(1, len(x) + 1, dtype=np.float16))
        assert not x.flags.writeable
        assert jax.device_put(x, jax.devices("cpu")[0]).unsafe_buffer_pointer() == x.ctypes.data


def test_a_file_that_changes_under_the_reader(tmp_path):
    save(tmp_path, {"x": np.zeros(10, np.float32)})
    reader = SafetensorsReader(tmp_path)
    with open(tmp_path / "model.safetensors", "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="was changed while it was being read"):
        reader.read("x")
