"""Every architecture with every suite of published checkpoints: what the configs resolve to, and a run of 20 tasks."""

import functools

import jax
import numpy as np
import pytest

from configs import clip, finetune_clip, glue, quickstart
from experiments import benchmark, experts, finetune, output, prepare, scoring
from taskvec import models
from taskvec.data import clip_suites, suites
from taskvec.evaluation import rows as rows_lib
from taskvec.training import heads
from tests.experiments import published
from tests.experiments.stand_ins_for_tests import ROWS

SUITES = ("clip8", "clip14", "clip20")
# Weights of the image towers with their projections (FusionBench: 87,456,000 without it for B/32, 303,179,776 L/14).
WEIGHTS = {"b32": 87_456_000 + 768 * 512, "b16": 86_192_640, "l14": 303_179_776 + 1024 * 768}
HUB = (
    "sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd", "oxford_flowers102", "pcam",
    "fer2013", "oxford-iiit-pet", "stl10", "cifar100", "cifar10", "food101", "fashion_mnist", "emnist_letters",
    "kmnist", "rendered-sst2",
)  # fmt: skip


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("arch", clip.ARCHITECTURES)
def test_merging_resolves(arch, suite, tmp_path):
    config = clip.get_config(f"arch={arch},suite={suite}")
    count = int(suite.removeprefix("clip"))
    owner, name = config.model.split("/")
    assert owner == "openai" and len(config.checkpoints) == count
    tasks = clip_suites.SUITES[suite]
    assert [config.checkpoints[task] for task in tasks] == [f"tanganke/{name}_{x}" for x in HUB[:count]]
    config.methods = (*config.methods, "dare_ties")  # searched on the family's validation rows
    output.check(config, tmp_path)
    assert len(suites.classes_and_templates(config.suite)) == count and config.suite.tasks == tasks
    model = models.describe(published.write_config(tmp_path / "model", arch), part=config.part)
    assert sum(x.size for x in jax.tree.leaves(model.abstract)) == WEIGHTS[arch]
    assert model.config.image_size == config.suite.image_size
    experts.make_tuner(config, model)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(
    ("arch", "recipe"),
    [
        ("b32", "ft_ilharco"), ("b16", "ft_ilharco"), ("l14", "ft_ilharco_l14"),
        *((arch, "ft_fusionbench") for arch in clip.ARCHITECTURES),
    ],
)  # fmt: skip
def test_fine_tuning_resolves(arch, suite, recipe, tmp_path):
    """Every task has a number of steps that its warm-up fits into; those of the open_clip line are some 2,000."""
    folder = published.write_config(tmp_path / "model", arch)
    config = finetune_clip.get_config(f"model={folder},suite={suite},recipe={recipe}")
    finetune.check(config, tmp_path / "out")
    model = models.describe(folder, part=config.part)
    tuner = experts.make_tuner(config, model)
    open_clip = recipe.startswith("ft_ilharco")
    trained = jax.eval_shape(lambda params: tuner.trainable.init(params)[0], model.abstract)
    assert ("projection" in trained) == open_clip == config.augment
    assert suites.parse(config.suite).tasks == clip_suites.SUITES[suite]
    for task in clip_suites.SUITES[suite]:
        n = ROWS[task] - min(ROWS[task] // 10, 5000)
        found = tuner.recipe.for_task(task, n, config.suite.family)
        assert 1000 < found.steps <= 4000, task
        assert found.warmup_steps == (500 if open_clip else 0)
        np.testing.assert_allclose(found.schedule()(found.warmup_steps), 1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("module", "arg", "change", "tag"),
    [
        (clip, "", {}, "prompts/published"),
        (clip, "suite=clip20,checkpoints=HERE", {"head_scale": 20.0}, "prompts-x20/published"),
        (clip, "family=tall_masks", {}, "prompts-clip-vit-base-patch32/published"),
        (clip, "family=task_vectors,checkpoints=HERE", {"heads": "class_means"}, "class_means/published"),
        (clip, "", {"heads": "class_means", "head_scale": 20.0}, "class_means/published"),
        (clip, "", {"checkpoints.mnist": "results/experts/seed0/mnist"}, "prompts/given"),
        (clip, "", {"checkpoints": {}}, "prompts/own"),
        (glue, "", {}, "answers/published"),
        (glue, "model=flan_t5_large", {}, "answers/published"),
        (glue, "model=roberta_base,checkpoints=HERE", {}, "trained/published"),
        (glue, "model=gpt2", {"checkpoints.cola": "mine"}, "trained/given"),
        (quickstart, "", {}, "class_means/own"),
        (quickstart, "", {"head_scale": 50.0}, "class_means-x50/own"),
    ],
)
def test_results_under_other_heads_or_of_other_experts_have_another_tag(module, arg, change, tag):
    config = module.get_config(arg)
    with config.unlocked():
        for name, value in change.items():
            of, _, key = name.rpartition(".")
            (config[of] if of else config)[key] = value
    suite, *found = scoring.protocol(config).rsplit("/", 2)
    assert found == tag.split("/") and suite == suites.protocol(config.suite)


def test_twenty_tasks_with_corrupted_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "EXPERTS", tmp_path / "experts")
    few = functools.partial(heads.zero_shot, batch_size=10)  # one shape for nearly all tasks
    monkeypatch.setattr(heads, "zero_shot", few)
    published.write(tmp_path, clip_suites.SUITES["clip20"], clip.ARCHITECTURES["l14"], train=48, test=16)
    config = clip.get_config(
        f"arch=l14,suite=clip20,checkpoints={tmp_path},source={tmp_path / 'data'},size=20,corruption=motion_blur:5:32,"
        "runlocal"
    )
    config.methods, config.claims = ("pretrained", "task_arithmetic", "individual"), ()
    benchmark.benchmark(config, tmp_path / "results")
    found = rows_lib.loads((tmp_path / "results" / "result.jsonl").read_text())
    assert [row.label for row in found] == list(config.methods)
    for row in found:
        assert row.accuracy.keys() == set(clip_suites.SUITES["clip20"])
        assert row.protocol.endswith("px20-clip/motion_blur:5:32/prompts/published") and "fusion_bench" in row.protocol
        assert row.suite == "clip_l14_clip20_motion_blur_5_32"
