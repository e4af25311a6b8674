"""The families of OpenCLIP's checkpoints, task_vectors and tall_masks, merged from a config on stand-in files."""

import jax
import numpy as np
import pytest

from configs import clip
from experiments import benchmark, prepare
from taskvec import tree as trees
from taskvec.data import clip_suites
from taskvec.evaluation import rows as rows_lib
from taskvec.io import names, open_clip, safetensors
from taskvec.models import clip as clip_model
from tests.data.pictures_for_tests import folders
from tests.experiments.published import ARCHITECTURE, TASKS
from tests.experiments.stand_ins_for_tests import with_tokenizer
from tests.io import hub_for_tests as fake_hub, torch_files_for_tests as torch_files

# Heads are 64 wide in all that was published, so a tower is at least so wide; its features are as wide as the texts'.
TOWER = {
    "model_type": "clip_vision_model", "architectures": ["CLIPVisionModelWithProjection"], "hidden_size": 64,
    "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_act": "quick_gelu",
    "image_size": 20, "patch_size": 5, "projection_dim": 14,
}  # fmt: skip


def tower(seed, around=None):
    """Random weights of the tower, or random changes of those in `around`; path -> array."""
    rng = np.random.default_rng(seed)
    shapes = trees.flatten(clip_model.make(clip_model.from_json(TOWER)).abstract)
    drawn = {path: 0.1 * rng.standard_normal(x.shape).astype(np.float32) for path, x in shapes.items()}
    if around is not None:
        return {path: around[path] + 0.2 * x for path, x in drawn.items()}
    return {path: x + path.endswith("scale") for path, x in drawn.items()}


def write(file, flat):
    """A state dict as the authors' code saves it: the tower, and what is left of the text tower without its blocks."""
    table = clip_model.make(clip_model.from_json(TOWER)).table
    arrays = open_clip.from_hf(names.to_names(table, trees.unflatten(flat)))
    arrays |= {"token_embedding.weight": np.ones((9, 8), np.float32), "logit_scale": np.float32(4.6)}
    arrays = {f"model.{name}": np.asarray(x) for name, x in arrays.items()}
    if file.suffix == ".pt":
        torch_files.save(file, arrays)
    else:
        safetensors.save(file, arrays)


@pytest.fixture
def towers(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKVEC_CACHE", str(tmp_path / "cache"))
    for task in TASKS:
        for split in ("train", "test"):
            folders(tmp_path / "data" / task / split, [str(digit) for digit in range(10)], 5)
    start = tower(0)
    return {"start": start} | {task: tower(i, start) for i, task in enumerate(TASKS, 1)}


def same(params, flat):
    found = trees.flatten(jax.device_get(params))
    assert found.keys() == flat.keys()
    for path, x in flat.items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)


def arguments(tmp_path, family):
    return f"family={family},source={tmp_path / 'data'},tasks={'+'.join(TASKS)},size=20,runlocal"


def test_task_vectors_from_a_folder(tmp_path, towers):
    """One expert as safetensors; the conversions are made once."""
    with_tokenizer(tmp_path / ARCHITECTURE, "clip_both", 59, 60)
    for name, flat in towers.items():
        title = clip_suites.TASKS[name].title if name in TASKS else ""
        suffix = "safetensors" if name == "svhn" else "pt"
        write(tmp_path / "ViT-B-32" / (f"{title}/finetuned.{suffix}" if title else "zeroshot.pt"), flat)
    config = clip.get_config(f"checkpoints={tmp_path},{arguments(tmp_path, 'task_vectors')}")
    config.methods, config.claims = ("pretrained", "task_arithmetic", "individual"), (("pretrained", "individual"),)
    benchmark.benchmark(config, tmp_path / "results")
    found = {row.label: row for row in rows_lib.loads((tmp_path / "results" / "result.jsonl").read_text())}
    assert found.keys() == set(config.methods)
    assert all("task_vectors-dtd:test-emnist:digits" in row.protocol for row in found.values())
    made = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "cache" / "converted").iterdir())
    assert made == ["MNIST-finetuned", "SVHN-finetuned", "ViT-B-32-zeroshot"]
    base = prepare.load_base(config)
    same(base.pretrained, towers["start"])
    for task in TASKS:
        folder = prepare.model_folder(config.checkpoints[task])
        same(prepare.checkpoint(base, folder, config.part), towers[task])
    assert len(list((tmp_path / "cache" / "converted").iterdir())) == 3


def test_tall_masks_from_the_hub(tmp_path, towers, monkeypatch):
    at = tmp_path / "hub" / "nik-dim" / "tall_masks" / "single_task" / "ViT-B-32"
    write(at / "MNISTVal" / "nonlinear_zeroshot.pt", towers["start"])
    for task in TASKS:
        write(at / f"{clip_suites.TASKS[task].title}Val" / "nonlinear_finetuned.pt", towers[task])
    hub = fake_hub.install(monkeypatch, tmp_path / "hub", tmp_path / "fetched")
    config = clip.get_config(arguments(tmp_path, "tall_masks"))
    assert config.text_model == f"openai/{ARCHITECTURE}" and "tall_masks" in config.name
    base = prepare.load_base(config)
    same(base.pretrained, towers["start"])
    same(prepare.checkpoint(base, prepare.model_folder(config.checkpoints.svhn), config.part), towers["svhn"])
    # Nothing was fetched but what was asked for.
    files = {path.parent.name for path in hub.fetched.rglob("*.pt")}
    assert files == {"MNISTVal", "SVHNVal"} and len(list(hub.fetched.rglob("*.pt"))) == 2


def test_names_and_what_is_refused():
    config = clip.get_config("family=tall_masks,arch=l14,suite=clip20,checkpoints=HERE")
    assert config.model == "HERE/ViT-L-14/MNISTVal/nonlinear_zeroshot.pt"
    assert config.text_model == "HERE/clip-vit-large-patch14"
    assert config.checkpoints.pets == "HERE/ViT-L-14/OxfordIIITPetVal/nonlinear_finetuned.pt"
    assert config.checkpoints.rendered_sst2 == "HERE/ViT-L-14/RenderedSST2Val/nonlinear_finetuned.pt"
    with pytest.raises(ValueError, match="the checkpoints of task_vectors are on no hub"):
        clip.get_config("family=task_vectors")
    with pytest.raises(ValueError, match="suite='clip14'; allowed for task_vectors: clip8"):
        clip.get_config("family=task_vectors,suite=clip14,checkpoints=HERE")
    with pytest.raises(ValueError, match="family='ilharco'; allowed: task_vectors, tall_masks, fusion_bench"):
        clip.get_config("family=ilharco")
