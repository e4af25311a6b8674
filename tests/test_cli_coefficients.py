"""`taskvec merge --method coefficients`: learned coefficients on checkpoints, as in memory."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import taskvec as tv
from taskvec import models, tree as trees
from taskvec.adaptive.coefficients import coefficients as parametrisation
from taskvec.io import coefficients as io, safetensors
from tests.cli_for_tests import refused, run

RECORDED = pathlib.Path(__file__).parent / "models" / "recorded"


def setting(tmp_path, folder, part=None, tasks=("svhn", "cars"), plus_plus=False, partitions=1):
    """Folders of experts, a file of coefficients of the part, and the params that it merges in memory."""
    rng = np.random.default_rng(0)
    whole, everything = models.load(RECORDED / folder)
    experts = []
    for task in tasks:
        params = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), everything)
        models.save(tmp_path / task, whole, params, source=RECORDED / folder)
        experts.append(models.load(tmp_path / task, part=part)[1])
    model, theta0 = models.load(RECORDED / folder, part=part)
    groups, tau = trees.groups(theta0, "tensor"), tv.task_vectors(theta0, experts)
    values = rng.uniform(0, 1, (len(groups.names), len(tasks), partitions)).astype(np.float32)
    values = values[..., 0] if partitions == 1 else values
    settings = {"plus_plus": plus_plus}
    io.save(tmp_path / "found", io.of(theta0, values, groups.names, tasks, "adamerging", settings, seed=3))
    learned = parametrisation(groups, len(tasks), partitions=partitions, seed=3)
    if plus_plus:
        tau = tv.transform_task_vectors(tv.chain(tv.trim(density=0.2), tv.elect_signs()), theta0, tau)
    return model, theta0, jax.jit(learned.merge)(theta0, tau, {"lam": values})


def words(tmp_path, folder, *experts, out="out"):
    named = [word for expert in experts for word in ("--expert", expert)]
    to = ["--set", f"file={tmp_path / 'found.npz'}", "--out", tmp_path / out]
    return ["merge", "--method", "coefficients", "--base", RECORDED / folder, *named, *to]


@pytest.mark.parametrize(
    "folder, part, plus_plus, partitions",
    [
        ("clip_both", "vision_projected", False, 1),
        ("bert_odd", None, True, 1),
        ("clip_both", "vision_projected", False, 3),
    ],
)
def test_a_folder_is_merged_as_in_memory(tmp_path, folder, part, plus_plus, partitions):
    _, theta0, expected = setting(tmp_path, folder, part, plus_plus=plus_plus, partitions=partitions)
    # Out of order: labels bring the experts to the columns.
    run(*words(tmp_path, folder, tmp_path / "cars", f"svhn={tmp_path / 'svhn'}"))
    merged = models.load(tmp_path / "out", part=part)[1]
    for path, x in trees.flatten(expected).items():
        np.testing.assert_allclose(trees.flatten(merged)[path], x, atol=1e-6, err_msg=path)
        assert np.abs(x - trees.flatten(theta0)[path]).max() > 1e-3
    if part:  # the rest is the base's
        rest = models.load(tmp_path / "out", part="text")[1]
        jax.tree.map(np.testing.assert_array_equal, rest, models.load(RECORDED / folder, part="text")[1])
    record = tmp_path / "out" / "taskvec_merge.json"
    settings = json.loads(record.read_text())["request"]["settings"]
    assert settings["plus_plus"] is plus_plus and settings["file"] == str(tmp_path / "found.npz")
    # The record holds the numbers: it can be repeated without the file.
    (tmp_path / "found.npz").unlink()
    run("merge", record, "--out", tmp_path / "again")
    one, two = (safetensors.load(tmp_path / name) for name in ("out", "again"))
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


def test_refusals_and_the_plan(tmp_path, capsys):
    setting(tmp_path, "vit_odd")
    shutil.copytree(tmp_path / "svhn", tmp_path / "x")
    call = lambda *experts, folder="vit_odd": words(tmp_path, folder, *(tmp_path / e for e in experts))
    assert "are of 2 tasks (svhn, cars), but 1 experts" in refused(capsys, *call("svhn"))
    assert "call each by its task, --expert TASK=MODEL" in refused(capsys, *call("svhn", "x"))
    assert "are of another model" in refused(capsys, *call("svhn", "cars", folder="bert_odd"))
    learned = io.load(tmp_path / "found")
    io.save(tmp_path / "found", learned._replace(settings={}))
    assert "add --set plus_plus=True or False" in refused(capsys, *call("svhn", "cars"))
    run(*call("svhn", "cars"), "--set", "plus_plus=False", "--dry-run")
    capsys.readouterr()
    io.save(tmp_path / "found", learned._replace(method="adarank"))
    assert "masks of ranks): save the merged model itself" in refused(capsys, *call("svhn", "cars"))
    io.save(tmp_path / "found", learned)
    bare = [w for w in call("svhn", "cars") if w not in ("--set", f"file={tmp_path / 'found.npz'}")]
    assert "needs --set file=PATH" in refused(capsys, *bare)
    run(*call("svhn", "cars"), "--dry-run")
    text = capsys.readouterr().out
    assert "table=(32 rows)" in text and "by tensor" in text and not (tmp_path / "out").exists()


def test_adaptive_methods_are_listed_and_explained(capsys):
    run("methods")
    text = " ".join(capsys.readouterr().out.split())
    assert "surgery_v2" in text and "not by `taskvec merge`" in text and "coefficients" in text
    run("methods", "prodistill")
    text = " ".join(capsys.readouterr().out.split())
    for wanted in ("2502.12706", "learning_rate", "0.01", "unlabelled train", "how to run", "loss of every step"):
        assert wanted in text
    assert "--task" not in text
    assert "did you mean 'prodistill'" in refused(capsys, "methods", "prodistil")
