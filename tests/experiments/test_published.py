"""The configs of published checkpoints, and of a transformer trained from nothing, on stand-ins of the true layout."""

import json

import jax
import ml_collections
import numpy as np
import pytest

from configs import clip, clip_small
from experiments import benchmark, experts, prepare
from taskvec import models
from taskvec.data.base import Split, Task
from taskvec.evaluation import rows as rows_lib
from tests.experiments import published as stand_ins
from tests.experiments.published import ARCHITECTURE, arguments
from tests.experiments.stand_ins_for_tests import RECORDED


@pytest.fixture
def published(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "EXPERTS", tmp_path / "experts")
    return stand_ins.write(tmp_path)


def test_clip_checkpoints_are_merged_under_heads_from_prompts(published):
    config = clip.get_config(arguments(published))
    config.methods, config.claims = (
        ("pretrained", "task_arithmetic", "adamerging", "individual"),
        (("pretrained", "individual"),),
    )
    benchmark.benchmark(config, published / "results")
    found = {row.label: row for row in rows_lib.loads((published / "results" / "result.jsonl").read_text())}
    assert found.keys() == set(config.methods) and "fusion_bench" in found["individual"].protocol
    expert = prepare.checkpoint(prepare.load_base(config), published / f"{ARCHITECTURE}_mnist", config.part)
    _, own = models.load(published / f"{ARCHITECTURE}_mnist")
    _, start = models.load(published / ARCHITECTURE, part=config.part)
    assert expert.keys() == start.keys() and expert.keys() - own.keys() == {"projection"}
    np.testing.assert_array_equal(expert["blocks"]["mlp"]["up"]["kernel"], own["blocks"]["mlp"]["up"]["kernel"])


def test_a_checkpoint_of_another_model(published, monkeypatch):
    base = prepare.load_base(clip.get_config(arguments(published)))
    with pytest.raises(ValueError, match="clip_tower is not a fine-tuned copy of the pretrained model"):
        prepare.checkpoint(base, RECORDED / "clip_tower", "vision_projected")
    # The shapes are the same; the second expert is refused before rows are read and the first one is loaded.
    folder = published / f"{ARCHITECTURE}_svhn"
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-6}))
    monkeypatch.setattr(prepare, "load_tasks", None)
    with pytest.raises(ValueError, match=r"_svhn .*hidden_act is 'quick_gelu', there 'gelu'; layer_norm_eps is 1e-06"):
        prepare.prepare(clip.get_config(arguments(published)), base, 0)


def test_processes_share_the_rows(monkeypatch):
    split = Split({"image": np.zeros((11, 2, 2, 3), np.uint8)}, np.arange(11) % 2)
    task, config = Task("t", ("a", "b"), split, split, split), ml_collections.ConfigDict({"eval_batch_size": 4})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    seen = []
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        own = prepare.Bench(None, [task], None, [], 0, config).batches(0, "test")
        index = [batch["index"] for batch in own]
        assert [len(part) for part in index] == [2, 2, 2] and not list(own)  # batches are made once and not kept
        seen += [row for part in index for row in part if row >= 0]
    assert sorted(seen) == list(range(11))
    with pytest.raises(RuntimeError, match="fine-tuning t is done by one process, here are 2"):
        experts.train(None, None, task, None, 0)


def test_from_nothing_to_a_merged_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "EXPERTS", tmp_path / "experts")
    monkeypatch.setenv("TASKVEC_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name in (*clip_small.PRETRAIN, *clip_small.TASKS):
        rows = {f"x_{s}": rng.integers(0, 256, (n, 28, 28), np.uint8) for s, n in (("train", 60), ("test", 20))}
        labels = {f"y_{s}": (np.arange(n) % 3).astype(np.uint8) for s, n in (("train", 60), ("test", 20))}
        np.savez(tmp_path / f"image_{name}.npz", **rows, **labels)
    config = clip_small.get_config(f"source={tmp_path},runlocal")
    config.suite.tasks = config.suite.tasks[:2]
    config.methods = ("pretrained", "weight_average", "joint", "individual")
    config.claims = (("pretrained", "individual"),)
    benchmark.benchmark(config, tmp_path / "results")
    rows = {row.label: row for row in rows_lib.loads((tmp_path / "results" / "result.jsonl").read_text())}
    assert rows.keys() == set(config.methods)
    joint = rows["joint"]
    assert (joint.data_access, joint.result, joint.task_id_needed) == ("labelled train", "static", False)
    assert joint.seconds > 0 and joint.settings["balancer"] == "equal"
    capsys.readouterr()
    config.methods = ("joint", "individual")
    config.claims = (("joint", "individual"),)
    benchmark.benchmark(config, tmp_path / "again")
    again = rows_lib.loads((tmp_path / "again" / "result.jsonl").read_text())[0]
    assert (again.accuracy, again.seconds) == (joint.accuracy, joint.seconds)
    assert "joint (seed 0): from the cache" in capsys.readouterr().err
    assert prepare.load_base(config).model.name == "clip_vision_model"  # from the cache, or it would train again
