"""Weights in PyTorch's files, one tensor at a time; files that PyTorch wrote (tests/parity/record_torch_files.py)."""

import json
import pathlib

import numpy as np
import pytest

from taskvec import cli, models
from taskvec.io import safetensors, torch_checkpoint
from taskvec.io.folders import open_model
from taskvec.io.torch_reader import TorchReader, open_weights
from taskvec.models import classifiers
from tests.io import torch_files_for_tests as torch_files
from tests.io.folders_for_tests import BF16, family, mean, tensors, write
from tests.io.torch_files_for_tests import WRITERS, Call, Global, example

RECORDED = pathlib.Path(__file__).parent / "recorded" / "torch_files"
BERT = pathlib.Path(__file__).parents[1] / "models" / "recorded" / "bert_even"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "legacy.bin", "sharded"])
def test_what_pytorch_wrote(name):
    """As PyTorch itself listed the numbers: of several dtypes, transposed, slices of a larger tensor, shared."""
    with np.load(RECORDED / "numbers.npz") as file:
        wanted = {key: x.view(BF16) if key == "bfloat16" else x for key, x in file.items()}
    reader = TorchReader(RECORDED if name == "pytorch_model.bin" else RECORDED / name)
    assert reader.specs.keys() == wanted.keys()
    for key, x in wanted.items():
        assert (reader.specs[key].shape, reader.specs[key].dtype) == (x.shape, x.dtype), key
        np.testing.assert_array_equal(reader.read(key), x, err_msg=key)
        if x.ndim:
            np.testing.assert_array_equal(reader.read(key, slice(1, 3)), x[1:3], err_msg=key)
    assert len(reader.files) == (2 if name == "sharded" else 1)
    if name != "sharded":
        eager = torch_checkpoint.load_state_dict(reader.files[0])
        assert all(np.array_equal(eager[key], x) for key, x in wanted.items())


@pytest.mark.parametrize("kind", WRITERS)
def test_tensors_of_a_hand_made_file(tmp_path, kind):
    table, storages, expected = example(kind == "legacy")
    WRITERS[kind](tmp_path / "x.bin", table, storages)
    reader = open_weights(tmp_path / "x.bin")
    for name, x in expected.items():
        found = reader.read(name)
        np.testing.assert_array_equal(found, x, err_msg=name)
        assert found.dtype == x.dtype and not found.flags.writeable
    assert reader.read("empty").shape == (0, 5)


def test_safetensors_come_first(tmp_path):
    arrays = tensors({"a": (3, 2)}, 0)
    torch_files.save_folder(tmp_path / "m", arrays)
    assert isinstance(open_weights(tmp_path / "m"), TorchReader)
    write(tmp_path / "m", {"b": np.ones(2, np.float32)})
    assert open_weights(tmp_path / "m").specs.keys() == open_model(tmp_path / "m").specs.keys() == {"b"}


def test_wrong_files(tmp_path):
    folder = torch_files.save_folder(tmp_path / "m", tensors({"a": (3,), "b": (4,)}, 0), shards=2)
    first = folder / "pytorch_model-00001-of-00002.bin"
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    moved = index | {"weight_map": index["weight_map"] | {"c": first.name}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(moved))
    with pytest.raises(ValueError, match=rf"promises tensors .*c \({first.name}\)"):
        open_model(folder)
    whole = first.read_bytes()
    first.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=rf"{first.name} is damaged"):
        open_model(folder)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=rf"names {first.name}, but the folder holds"):
        open_model(folder)
    WRITERS["zip"](tmp_path / "evil.bin", {"a": Call(Global("os", "system"), f"touch {tmp_path / 'ran'}")}, {})
    assert cli.main(["inspect", str(tmp_path / "evil.bin"), str(tmp_path / "evil.bin")]) == 2
    assert not (tmp_path / "ran").exists()
    torch_files.save(tmp_path / "nan.bin", {"x": np.array([1, np.nan], np.float32)})
    with pytest.raises(ValueError, match=r"nan.bin: tensor x holds NaN"):
        open_weights(tmp_path / "nan.bin").read("x")


def test_a_byte_that_changed(tmp_path):
    file = torch_files.save(tmp_path / "x.pt", {"x": np.arange(64, dtype=np.float32)})
    data = file.read_bytes()
    at = data.index(np.arange(64, dtype=np.float32).tobytes())
    file.write_bytes(data[: at + 8] + b"\xff" + data[at + 9 :])
    with pytest.raises(ValueError, match=r"x\.pt is damaged: the checksum of storage 0"):
        torch_checkpoint.load_state_dict(file)


@pytest.mark.parametrize("shards", [1, 2])
def test_models_are_loaded_saved_and_merged(tmp_path, shards):
    """A BERT with a head, in PyTorch's files; the merge of those is that of the numbers."""
    _, params = models.load(BERT)
    arrays = dict(safetensors.load(BERT))
    named = {f"bert.{key}": x for key, x in arrays.items()}
    head = {"classifier.weight": np.eye(2, 32, dtype=np.float32), "classifier.bias": np.ones(2, np.float32)}
    folder = torch_files.save_folder(tmp_path / "model", named | head, shards)
    (folder / "config.json").write_text((BERT / "config.json").read_text())
    model, found = models.load(folder)
    for a, b in zip(*(sorted(map(str, _flat(x))) for x in (params, found)), strict=True):
        assert a == b
    models.save(tmp_path / "saved", model, found, source=folder)
    saved = safetensors.load(tmp_path / "saved")
    assert saved.keys() == (named | head).keys()
    np.testing.assert_array_equal(saved["classifier.weight"], head["classifier.weight"])
    pooled = np.tanh(np.ones(32) @ arrays["pooler.dense.weight"].T.astype(float) + arrays["pooler.dense.bias"])
    logits = classifiers.load(folder, "bert")(np.ones((1, 32), np.float32))
    np.testing.assert_allclose(logits[0], pooled[:2] + 1, rtol=1e-5)
    made = family(tmp_path, {"h.0.w": (6, 4), "h.1.w": (6, 4), "wte": (30, 4)})
    for name in ("base", "a"):
        torch_files.save_folder(tmp_path / name, made[name], shards)
    words = ["--base", tmp_path / "base", "--expert", tmp_path / "a", "--expert", tmp_path / "b"]
    words = ["merge", "--method", "weight_average", *words, "--out", tmp_path / "out", "--memory", "2kB"]
    assert cli.main([str(word) for word in words]) == 0
    for key, x in safetensors.load(tmp_path / "out").items():
        np.testing.assert_allclose(x, mean(made)[key], rtol=1e-6, atol=1e-6, err_msg=key)
    assert not any("pytorch_model" in path.name for path in (tmp_path / "out").iterdir())


def _flat(tree):
    return [x for value in tree.values() for x in (_flat(value) if isinstance(value, dict) else [np.asarray(value)])]
