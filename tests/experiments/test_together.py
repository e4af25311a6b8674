"""One model for all tasks from a config: joint training, ATM and ForkMerge, killed and resumed, on the tiny models."""

import json

import jax
import numpy as np
import pytest

from configs import finetune_text
from experiments import experts, finetune, prepare, together
from taskvec import models, tree as trees
from taskvec.io.checkpoints import Checkpoint
from taskvec.training import balancers, multitask
from tests.experiments import test_finetune
from tests.experiments.stand_ins_for_tests import WORDS, config_of, with_tokenizer, write_pictures

compiled_once = test_finetune.compiled_once  # a fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks of pictures and a CLIP, two tasks of texts of different lengths and a RoBERTa."""
    found = tmp_path_factory.mktemp("together")
    write_pictures(found)
    with_tokenizer(found / "clip", "clip_both", 59, 60)
    with_tokenizer(found / "roberta", "roberta_tiny", 0, 2)
    rng = np.random.default_rng(0)
    for name, n in (("left", 60), ("right", 80)):
        rows = [
            {"split": split, "text": f"{WORDS[6 + i % 2]} thing {rng.integers(10**6)}", "label": i % 2}
            for split, number in (("train", n), ("test", 20))
            for i in range(number)
        ]
        (found / f"text_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def of_pictures(folder, train, **settings):
    found = config_of(folder / "clip", folder / "tasks.json", train=train)
    found.finetune.update({"steps": 4, "learning_rate": 1e-3})
    found.checkpoint_every = 2
    found[train.partition("+")[0]].update(settings)
    return found


def of_texts(folder, train, **settings):
    arg = f"model={folder / 'roberta'},suite=local,source={folder},length=16,train={train},runlocal"
    found = finetune_text.get_config(arg)
    found.finetune.update({"steps": 8, "learning_rate": 1e-2})
    found.checkpoint_every = 2
    found[train.partition("+")[0]].update(settings)
    return found


def killed(job, workdir, monkeypatch, saves):
    """Starts a run as `experiments.finetune` does and ends it after a number of checkpoints."""
    save, left = Checkpoint.save, [saves]

    def last(self, step, state):
        save(self, step, state)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    place, log = workdir / "checkpoints" / "seed0" / job.name, finetune.Log(workdir / "metrics.jsonl", job.name, 0)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", last)
        with pytest.raises(KeyboardInterrupt):
            job.train(place=place, record=log)
    assert len(list(place.rglob("*"))) > 10


@pytest.mark.parametrize(
    "make, train, settings, saves, steps",
    [
        (of_texts, "joint+coba", {"history": 4, "warmup": 2, "horizon": 6}, 1, 8),
        (of_pictures, "atm", {"rounds": 2}, 4, 8),  # in the second round, one of its tasks is trained
        # After the first merge.
        (of_pictures, "forkmerge", {"targets": ("two",), "branches": (0, 1), "merges": 2, "evaluations": 2}, 3, 10),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, folder, monkeypatch, make, train, settings, saves, steps):
    config = make(folder, train, **settings)
    bench = prepare.load_tasks(config, prepare.load_base(config), 0)
    job, kind, seen = together.job(bench, *together.of_config(config)), train.partition("+")[0], []
    killed(job, tmp_path, monkeypatch, saves)
    before = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    finetune.finetune(config, tmp_path)
    whole = job.train(record=lambda step, metrics, rate: seen.append((step, metrics)))
    _, found = models.load(tmp_path / "seed0" / kind, part=config.part or None)
    start = trees.flatten(bench.base.pretrained)
    expected = {path: np.asarray(x) for path, x in trees.flatten(whole.params).items()}
    for path, x in trees.flatten(found).items():
        np.testing.assert_array_equal(x, expected[path], err_msg=path)
    assert any(not np.array_equal(x, start[path]) for path, x in expected.items())
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(1, steps + 1)) and 0 < before < steps
    assert seen[-1][0] == steps
    for name in seen[0][1]:
        np.testing.assert_allclose([x[name] for x in lines], np.concatenate([x[name] for _, x in seen]), atol=1e-6)
    about = json.loads((tmp_path / "seed0" / kind / "expert.json").read_text())
    assert about["together"]["kind"] == about["task"] == kind and about["together"]["tasks"] == list(config.suite.tasks)
    assert {name: set(scores) for name, scores in about["accuracy"].items()} == {
        "pretrained": set(config.suite.tasks), "expert": set(config.suite.tasks),
    }  # fmt: skip
    assert not (tmp_path / "checkpoints" / "seed0" / kind).exists()
    if kind == "joint":
        assert lines[0]["weights"] == [1.0, 1.0] != lines[-1]["weights"]
        np.testing.assert_allclose(lines[0]["losses"], losses_before(bench), rtol=1e-4)


def losses_before(bench):
    """Each task's loss at the start, on the first batch that its expert would have, by NumPy from the features."""
    apply, found = jax.jit(bench.base.model.apply), []
    for t, task in enumerate(bench.tasks):
        batch = dict(experts.training_batches(bench.base.tuner, task, 8, 0)(0))
        label = batch.pop("label")
        z_Bxd = np.asarray(apply(bench.base.pretrained, batch)["features"], np.float64)
        z_Bxd /= np.linalg.norm(z_Bxd, axis=1, keepdims=True)
        logits_BxC = float(bench.heads.scale) * z_Bxd @ np.asarray(bench.heads.kernel[t], np.float64)
        found.append(np.mean(np.log(np.exp(logits_BxC).sum(1)) - logits_BxC[np.arange(len(label)), label]))
    return found


class Reached(Exception):
    """Carries the balancer that joint training was asked for."""


def test_balancers_are_reached(tmp_path, folder, monkeypatch):
    real, made = balancers.get, {}

    def get(name, **settings):
        made[name] = real(name, **settings)
        return made[name]

    def make_joint(apply_fn, optimiser, balancer, **settings):
        raise Reached(balancer)

    config = of_texts(folder, "joint")
    bench = prepare.load_tasks(config, prepare.load_base(config), 0)
    monkeypatch.setattr(multitask, "make_joint", make_joint)
    monkeypatch.setattr(balancers, "get", get)
    seen = {}
    for name in balancers.BALANCERS:
        config = of_texts(folder, f"joint+{name}")
        finetune.check(config, tmp_path)
        job = together.job(bench._replace(config=config), *together.of_config(config))
        made.clear()
        with pytest.raises(Reached) as reached:
            job.train()
        assert reached.value.args[0] is made.pop(name) and not made
        seen[job.key] = name
    assert list(seen.values()) == list(balancers.BALANCERS)  # each has a place of its own in the cache


def test_mistakes_are_reported_before_the_work(tmp_path, folder):
    def refused(match, train, change=lambda config: None, **settings):
        config = of_pictures(folder, train, **settings)
        config.unlock()
        change(config)
        with pytest.raises(ValueError, match=match):
            finetune.check(config, tmp_path)

    lt_sft = {"kind": "lt_sft", "density": 0.1, "exclude": "norm"}
    refused("unknown balancer 'pcgard'; there are: equal, pcgrad", "joint", balancer="pcgard")
    refused("pcgrad and alpha, form; allowed: balancer, tasks_at_once", "joint+gradnorm", balancer="pcgrad")
    refused("kind='lt_sft'; allowed: full", "joint", lambda c: c.update({"trainable": lt_sft}))
    refused("joint has no dropout", "joint", lambda c: c.finetune.update({"dropout": 0.1}))
    refused("heads='answers'; allowed: class_means, prompts", "joint", lambda c: c.update({"heads": "answers"}))
    refused("coba weighs tasks by losses on held-out", "joint+coba", lambda c: c.suite.update({"held_out": 0}))
    refused("rounds=7 of 4 steps", "atm", rounds=7)
    refused("by weights alone, which tall_masks does not", "atm", merge="tall_masks")
    refused("targets=.*, want some of one, two", "forkmerge")
    refused("branches=.0, 1, 2.: numbers of tasks that help, of the 1", "forkmerge", targets=("one",))
    for train, match in (("atm+pcgrad", "only joint takes a balancer"), ("joint+pcgard", "unknown balancer 'pcgard'")):
        with pytest.raises(ValueError, match=match):
            of_pictures(folder, train)
