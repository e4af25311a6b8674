"""Experts from a command: killed and resumed, in every form, on the tiny recorded models."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from configs import finetune_clip, finetune_text, glue, llama_pair
from experiments import experts, finetune, prepare
from taskvec import cli, models, tree as trees
from taskvec.data import clip_suites, suites
from taskvec.io import safetensors
from taskvec.training import recipes
from tests.experiments.stand_ins_for_tests import RECORDED, ROWS, WORDS, config_of, with_tokenizer, write_pictures


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Programs that several runs share, the killed one included, are compiled once, as in the command."""
    cache = tmp_path_factory.mktemp("cache")
    settings = {
        "jax_compilation_cache_dir": str(cache / "compiled"), "jax_persistent_cache_min_compile_time_secs": 0.0,
    }  # fmt: skip
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield cache
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def clip(tmp_path):
    return with_tokenizer(tmp_path / "clip", "clip_both", 59, 60)


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path)


def weights(folder):
    return safetensors.load(folder / "model.safetensors")


CHILD = """
import os, runpy, signal, sys
from taskvec.io.checkpoints import Checkpoint
save = Checkpoint.save
def killed(self, step, state):
    save(self, step, state)
    os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.save = killed
runpy.run_module("experiments.finetune", run_name="__main__")
"""


def test_a_run_killed_by_the_system_ends_with_the_same_bits(tmp_path, clip, pictures, capsys, compiled_once):
    arg = f"model={clip},source={pictures},suite=local,size=20,tasks=one,runlocal"
    flags = [f"--config=configs/finetune_clip.py:{arg}", f"--workdir={tmp_path / 'killed'}"]
    flags += ["--config.finetune.steps=8", "--config.checkpoint_every=4", "--config.finetune.learning_rate=1e-3"]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *flags], capture_output=True, text=True, cwd=RECORDED.parents[2],
        env=os.environ | {"TASKVEC_CACHE": str(compiled_once)},
    )  # fmt: skip
    assert done.returncode == -9, done.stderr[-2000:]
    assert not (tmp_path / "killed" / "seed0" / "one").exists()
    config = config_of(clip, pictures, tasks="one")
    config.finetune.update({"steps": 8, "learning_rate": 1e-3})
    config.checkpoint_every = 4
    finetune.finetune(config, tmp_path / "killed")
    finetune.finetune(config, tmp_path / "whole")
    killed, whole = (tmp_path / name for name in ("killed", "whole"))
    a, b = weights(killed / "seed0" / "one"), weights(whole / "seed0" / "one")
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    assert not np.array_equal(a["visual_projection.weight"], weights(clip)["visual_projection.weight"])
    assert np.array_equal(a["text_projection.weight"], weights(clip)["text_projection.weight"])
    lines = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (killed, whole)]
    seen = [[(x["step"], x["loss"], x["accuracy"]) for x in found] for found in lines]
    assert seen[0] == seen[1]
    assert [x["step"] for x in lines[1]] == list(range(1, 9)) and lines[1][0]["rows_per_second"] > 0
    assert not (killed / "checkpoints" / "seed0" / "one").exists()
    capsys.readouterr()
    finetune.finetune(config, killed)
    assert "finished before" in " ".join(capsys.readouterr().err.split())
    config.finetune.learning_rate = 1e-2
    with pytest.raises(ValueError, match="other settings"):
        finetune.finetune(config, killed)


def test_low_rank_experts_are_merged_by_the_command(tmp_path, clip, pictures):
    config = config_of(clip, pictures, train="lora", recipe="ft_fusionbench")
    config.trainable.update({"rank": 2, "alpha": 4.0})
    config.finetune.update({"learning_rate": 1e-2, "accumulate": 2, "dropout": 0.1, "label_smoothing": 0.1})
    finetune.finetune(config, tmp_path / "out")
    lines = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3, 4] * 2  # batches
    folders = [tmp_path / "out" / "seed0" / task for task in ("one", "two")]
    about = json.loads((folders[0] / "expert.json").read_text())
    assert set(about["accuracy"]) == {"pretrained", "expert"} and about["trainable"]["kind"] == "lora"
    with np.load(tmp_path / "out" / "seed0" / "heads.npz") as heads:
        assert heads["kernel"].shape == (2, 14, 3) and heads["tasks"].tolist() == ["one", "two"]
        assert float(heads["scale"]) == pytest.approx(np.exp(weights(clip)["logit_scale"]), rel=1e-5)
    merged = {}
    for kind, models_ in (("whole", folders), ("adapters", [f / "adapter" for f in folders])):
        to = tmp_path / f"merged_{kind}"
        command = ["merge", "--method=task_arithmetic", "--set=scale=1.0", f"--base={tmp_path / 'out' / 'pretrained'}"]
        assert not cli.main([*command, *(f"--expert={folder}" for folder in models_), f"--out={to}"])
        merged[kind] = weights(to)
    start = weights(clip)
    changed = [k for k, x in merged["whole"].items() if not np.array_equal(x, start[k])]
    assert changed and all("q_proj.weight" in k or "v_proj.weight" in k for k in changed)
    for name, x in merged["whole"].items():
        np.testing.assert_allclose(merged["adapters"][name], x, atol=1e-5)


def test_forms_of_training(tmp_path, clip, pictures):
    """Tangent and sparse; folders load again. FusionBench's projection stays."""
    for train in ("tangent", "lt_sft"):
        config = config_of(clip, pictures, train=train, tasks="two")
        finetune.finetune(config, tmp_path / train)
        _, tuned = models.load(tmp_path / train / "seed0" / "two", part="vision_projected")
        _, start = models.load(clip, part="vision_projected")
        changed = {p: np.mean(x != trees.flatten(start)[p]) for p, x in trees.flatten(tuned).items()}
        assert changed["projection/kernel"] > 0
        assert changed["blocks/mlp/up/kernel"] > 0
        if train == "lt_sft":
            assert changed["blocks/mlp_norm/scale"] == 0 and changed["blocks/mlp/up/kernel"] < 0.5
    fusionbench = experts.make_trainable(
        config_of(clip, pictures, recipe="ft_fusionbench").trainable, models.describe(clip, part="vision_projected")
    )
    assert start.keys() - fusionbench.init(start)[0].keys() == {"projection"}
    with pytest.raises(ValueError, match="experts are linear models"):
        config = config_of(clip, pictures, train="tangent")
        prepare.prepare(config, prepare.load_base(config), 0)


def test_text_models(tmp_path):
    rng = np.random.default_rng(0)
    line = lambda **row: json.dumps(row) + "\n"
    for name in ("left", "right"):
        rows = [
            line(split=split, text=f"{WORDS[6 + i % 2]} thing {rng.integers(10**6)}", label=i % 2)
            for split, n in (("train", 60), ("test", 20))
            for i in range(n)
        ]
        (tmp_path / f"text_{name}.jsonl").write_text("".join(rows))
    model = with_tokenizer(tmp_path / "roberta", "roberta_tiny", 0, 2)
    config = finetune_text.get_config(f"model={model},suite=local,source={tmp_path},length=16,train=attention,runlocal")
    assert config.suite.tasks == ("left", "right")
    finetune.check(config, tmp_path / "out")
    config.suite.max_length = 17
    with pytest.raises(ValueError, match=r"max_length=17, in batches of 32 tokens: .* the model has 18 positions\."):
        finetune.check(config, tmp_path / "out")
    gpt2, config = models.describe(RECORDED / "gpt2_tiny"), llama_pair.get_config("length=30,answer=8")
    experts.check_length(config, gpt2)
    config.max_new_tokens = 9
    with pytest.raises(ValueError, match="in batches of 32 tokens and answers of 9: texts of 41 tokens"):
        experts.make_tuner(config, gpt2)

    (tmp_path / "glue" / "rte").mkdir(parents=True)
    for split, n in (("train", 60), ("validation", 20)):
        rows = [line(sentence1="good thing", sentence2=f"{WORDS[6 + i % 2]} thing", label=i % 2) for i in range(n)]
        (tmp_path / "glue" / "rte" / f"{split}.jsonl").write_text("".join(rows))
    model = with_tokenizer(tmp_path / "t5", "t5_gated", None, 22)
    arg = f"model={model},suite=glue_text_to_text,source={tmp_path / 'glue'},tasks=rte,length=32,runlocal"
    finetune.finetune(finetune_text.get_config(arg), tmp_path / "out5")
    last = json.loads((tmp_path / "out5" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and np.isfinite(last["loss"])
    models.load(tmp_path / "out5" / "seed0" / "rte")
    assert (tmp_path / "out5" / "seed0" / "rte" / "tokenizer.json").is_file()


@pytest.mark.parametrize("suite", clip_suites.SUITES)
def test_every_published_task_has_its_recipe_and_protocol(suite):
    published = {}
    for recipe in recipes.RECIPES:
        if recipe in ("ft_peta", "small"):
            with pytest.raises(ValueError, match=f"none that {suite} was published with: take ft_ilharco, ft_ilh"):
                finetune_clip.get_config(f"suite={suite},recipe={recipe}")
            continue
        config = finetune_clip.get_config(f"suite={suite},recipe={recipe}")
        published[recipe] = suites.protocol(config.suite).split("/")[1].split("-")[0], config.augment
        kept = {"kind": "matching", "include": ".", "exclude": "^projection/"}
        assert config.trainable.to_dict() == ({"kind": "full"} if config.augment else kept)
        made, about = recipes.Recipe(**config.finetune), {"flowers102": 1140, "emnist": 3672}
        for task in clip_suites.SUITES[suite]:
            rows = ROWS[task] - min(ROWS[task] // 10, 5000)  # without those held out
            steps = made.for_task(task, rows, config.suite.family).steps
            wanted = about.get(task, 2000) if config.augment else 4000  # about 2,000, all sources say
            assert abs(steps / wanted - 1) < (0.12 if config.augment else 1e-9), (recipe, task, steps)
    open_clip = ("task_vectors" if suite == "clip8" else "tall_masks", True)
    assert published == {
        "ft_ilharco": open_clip, "ft_ilharco_l14": open_clip, "ft_fusionbench": ("fusion_bench", False),
    }  # fmt: skip


def test_mistakes_are_reported_before_the_work(tmp_path, clip, pictures):
    def refused(match, change=lambda config: None, error=ValueError, **more):
        config = config_of(clip, pictures, **more)
        config.unlock()
        change(config)
        with pytest.raises(error, match=match):
            finetune.check(config, tmp_path)

    finetune.check(config_of(clip, pictures), tmp_path)
    refused("image_size=224, but .* takes 20 pixels", size=224)
    refused("warm-up of 500 steps does not fit", lambda c: c.finetune.update({"warmup": 500.0}))
    refused("allowed: .*lt_sft", lambda c: c.trainable.update({"kind": "lora"}))
    refused("no leaf matches 'attn'", lambda c: c.trainable.update({"targets": "attn"}), train="lora")
    refused("allowed: class_means", lambda c: c.update({"heads": "prompt"}))
    refused("preprocess='clip'", lambda c: c.suite.update({"preprocess": ""}))
    refused("need each other|text-to-text", lambda c: c.update({"heads": "answers"}))
    refused("batch_size=64", lambda c: c.finetune.update({"batch_size": 64}))
    refused("has no text tower", lambda c: c.update({"text_model": str(RECORDED / "clip_tower")}))
    with pytest.raises(ValueError, match="train='lra'; allowed: full"):
        config_of(clip, pictures, train="lra")
    with pytest.raises(ValueError, match="unknown recipe"):
        config_of(clip, pictures, recipe="ilharco")
    with pytest.raises(ValueError, match="train=tangent trains it"):
        config_of(clip, pictures, recipe="ft_fusionbench", train="tangent")
    with pytest.raises(ValueError, match="clip8 has no stl10"):
        finetune_clip.get_config("tasks=mnist+stl10")
    with pytest.raises(ValueError, match="suite='clip9'; allowed: clip8"):
        finetune_clip.get_config("suite=clip9")
    lengths = {suite: f"suite={suite}" for suite in ("glue", "glue_text_to_text")}
    lengths = {suite: finetune_text.get_config(arg).suite.max_length for suite, arg in lengths.items()}
    assert lengths == {"glue": 128, "glue_text_to_text": glue.get_config().suite.max_length}
    assert finetune_clip.PROTOCOLS.keys() == recipes.RECIPES.keys()
    for recipe, preprocess in (("ft_peta", "square"), ("small", "clip"), ("ft_ilharco", "clip_round")):
        assert config_of(clip, pictures, recipe=recipe).suite.preprocess == preprocess
    assert config_of(clip, pictures, recipe="ft_peta", train="lt_sft").trainable.exclude == "norm|^projection/"
    for recipe, rows in (("ft_ilharco", (54, 6)), ("ft_fusionbench", (60, 0))):  # of 60
        config = config_of(clip, pictures, recipe=recipe, runlocal=False)
        (task, _) = suites.load_suite(config.suite)
        assert (len(task.train.labels), len(task.held_out.labels)) == rows
