"""Opening models by name: folders, files, checkpoints, the hub."""

import threading

import numpy as np
import pytest

from taskvec.io import safetensors
from taskvec.io.folders import open_model
from tests.io import hub_for_tests as fake_hub, torch_files_for_tests as torch_files
from tests.io.folders_for_tests import BF16, SHAPES, tensors, write


@pytest.mark.parametrize("shard_bytes", [700, 10**9])
def test_folders_and_files(tmp_path, shard_bytes):
    made = tensors(SHAPES["llama"], 0)
    folder = write(tmp_path / "m", made, shard_bytes=shard_bytes)
    model = open_model(folder)
    assert model.kind == "folder" and model.home == folder and model.config["model_type"] == "any"
    assert (len(model.files) > 1) == (shard_bytes == 700)
    for name, x in made.items():
        np.testing.assert_array_equal(model.read(name), x)
    file = open_model(model.files[0])
    assert file.kind == "file" and file.home is None and file.specs.keys() <= made.keys()


def test_a_folder_whose_only_file_has_another_name(tmp_path):
    safetensors.save(tmp_path / "m" / "weights.safetensors", tensors({"a": (2,)}, 0))
    assert open_model(tmp_path / "m").home == tmp_path / "m"


def test_threads_may_read_at_once(tmp_path):
    made = tensors({f"layers.{i}.w": (64, 33) for i in range(8)}, 0)
    reader = safetensors.SafetensorsReader(write(tmp_path / "m", made, shard_bytes=10_000))
    wrong = []

    def work():
        for name, x in made.items():
            for at in range(0, 64, 5):
                if not np.array_equal(reader.read(name, slice(at, at + 5)), x[at : at + 5]):
                    wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, np.float64])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_not_finite_is_found_in_every_dtype(tmp_path, dtype, bad):
    x = np.linspace(-3, 3, 200_000).astype(dtype)
    safetensors.save(tmp_path / "ok.safetensors", {"x": x})
    safetensors.SafetensorsReader(tmp_path / "ok.safetensors").read("x")
    x[123_456] = bad
    safetensors.save(tmp_path / "bad.safetensors", {"x": x})
    with pytest.raises(ValueError, match=r"bad.safetensors: tensor x holds NaN or infinity in 1 of 200000"):
        safetensors.SafetensorsReader(tmp_path / "bad.safetensors").read("x")


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.save(path, {"x": np.zeros(4, np.float32)})
    reader = safetensors.SafetensorsReader(path)
    safetensors.save(path, {"x": np.zeros(40, np.float32)})
    with pytest.raises(ValueError, match="was changed while it was being read"):
        reader.read("x")


def test_orbax_leaves_come_one_at_a_time(tmp_path):
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    tree = {"params": {"blocks": {"0": {"w": jnp.ones((3, 2), jnp.bfloat16)}}, "e": np.arange(6, dtype=np.float32)}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", tree)
    manager = ocp.CheckpointManager(tmp_path / "steps")
    for step in (2, 10):
        manager.save(step, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()
    manager.close()
    for path in ("plain", "steps"):
        model = open_model(tmp_path / path)
        assert model.kind == "orbax" and model.home is None
        assert {k: (v.shape, str(v.dtype)) for k, v in model.specs.items()} == {
            "params/blocks/0/w": ((3, 2), "bfloat16"),
            "params/e": ((6,), "float32"),
        }
        np.testing.assert_array_equal(model.read("params/e", slice(2, 4)), [2, 3])
        assert model.read("params/blocks/0/w").dtype == BF16
    assert "10" in str(open_model(tmp_path / "steps").files[0])


@pytest.mark.parametrize(
    ("config", "names", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, ["a"], r"is quantised \(gptq"),
        ({}, ["h.0.q.qweight", "h.0.q.scales"], r"holds quantised weights \(h.0.q.qweight\)"),
        ({}, ["h.0.q.weight", "h.0.q.weight.absmax"], "holds quantised weights"),
        ({}, ["h.0.q.weight", "h.0.q.SCB"], "holds quantised weights"),
    ],
)
def test_quantised_weights_are_refused(tmp_path, config, names, message):
    write(tmp_path / "m", {name: np.zeros(2, np.float32) for name in names}, config)
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path / "m")


def test_a_model_that_is_not_there(tmp_path, monkeypatch):
    write(tmp_path / "here", {"a": np.zeros(1, np.float32)})
    with pytest.raises(FileNotFoundError, match=r"ther is no file or folder here; .* holds here"):
        open_model(tmp_path / "ther")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"no-such-model is no file or folder here, and the Hugging Face hub"):
        open_model("no-such-model")


def test_a_hub_id_is_fetched_and_pinned_to_its_commit(tmp_path, monkeypatch):
    folder = write(tmp_path / "models--a--b" / "snapshots" / "0123abc", {"a": np.zeros(1, np.float32)})
    asked = {}

    def fetch(name, revision, allow_patterns):
        asked.update(name=name, revision=revision)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert open_model("a/b@main").pinned == "a/b@0123abc"
    assert asked == {"name": "a/b", "revision": "main"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Repositories in folders ``OWNER/NAME`` below `hub.root`, fetched by patterns as from the hub; `hub.fetched`."""
    return fake_hub.install(monkeypatch, tmp_path / "hub", tmp_path / "fetched")


def test_weights_of_pytorch_are_fetched_where_there_are_no_others(hub):
    arrays = tensors({"a": (2, 3)}, 0)
    torch_files.save_folder(write(hub.root / "o" / "old", arrays), arrays)
    write(hub.root / "o" / "new", arrays)
    (hub.root / "o" / "new" / "pytorch_model.bin").write_bytes(b"large")
    for name, file in (("o/old", "pytorch_model.bin"), ("o/new", "model.safetensors")):
        model = open_model(name)
        np.testing.assert_array_equal(model.read("a"), arrays["a"])
        assert [path.name for path in model.files] == [file] and model.home.name == "0123abc"
    assert not (model.home / "pytorch_model.bin").exists()


def test_a_folder_of_a_hub_repository(hub, tmp_path, monkeypatch):
    made = {task: tensors({"a": (2, 3)}, seed) for seed, task in enumerate(("cola", "rte"))}
    write(hub.root / "o" / "many" / "cola" / "lr1e-05", made["cola"])
    torch_files.save_folder(write(hub.root / "o" / "many" / "rte" / "lr1e-05", made["rte"]), made["rte"])
    for task, arrays in made.items():
        model = open_model(f"o/many/{task}/lr1e-05@main")
        np.testing.assert_array_equal(model.read("a"), arrays["a"])
        assert model.pinned == f"o/many/{task}/lr1e-05@0123abc" and model.home.name == "lr1e-05"
        np.testing.assert_array_equal(open_model(model.pinned).read("a"), arrays["a"])
        others = {"cola", "rte"} - {task}
        assert task != "cola" or not any((hub.fetched / "o" / "many" / "0123abc" / other).exists() for other in others)
    with pytest.raises(FileNotFoundError, match=r"the hub's o/many has no mrpc/lr1e-05; check"):
        open_model("o/many/mrpc/lr1e-05")
    # What begins with a folder of this disk is a path of this disk.
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs" / "best" / "cola", made["cola"])
    with pytest.raises(FileNotFoundError, match=r"no file or folder here; runs/best holds cola"):
        open_model("runs/best/colas")
