"""Rows of merges that need statistics of data, or give one model per task, on stand-ins of published checkpoints."""

import jax
import numpy as np
import pytest

import taskvec as tv
from configs import clip
from experiments import collected, output, prepare, runs
from taskvec import tree as trees
from taskvec.data import batches
from taskvec.evaluation import rows as rows_lib, scorers
from taskvec.merging import collect, registry
from taskvec.training import heads as heads_lib
from tests.experiments import published as stand_ins

CLASSES = (10, 12)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return clip.get_config(stand_ins.arguments(stand_ins.write(tmp_path_factory.mktemp("published"))))


@pytest.fixture(scope="module")
def bench(config):
    """With heads in all directions, of ten and twelve classes: those of the stand-ins' prompts are nearly equal."""
    made, rng = prepare.prepare(config, prepare.load_base(config), 0), np.random.default_rng(0)
    kernels_dxC = [rng.standard_normal((made.heads.kernel.shape[1], classes)) for classes in CLASSES]
    heads = heads_lib.make_heads([kernel / np.linalg.norm(kernel, axis=0) for kernel in kernels_dxC])
    return made._replace(heads=heads, scorer=scorers.of_heads(made.base.model.apply, heads))


def inputs(split):
    """All rows of a split in one batch."""
    return batches.take(split, np.arange(len(split.labels)))


def row_of(bench, config, label, settings):
    config = config.copy_and_resolve_references()
    config.settings.update({label: settings})
    outcome, table = runs.run(bench, label, settings, {}), output.Table(config)
    table.add(bench, label, outcome)
    return outcome, table.rows[0]


def check(bench, outcome, row, params):
    """Features and accuracies are those of these parameters, one tree per task."""
    for t, task in enumerate(bench.tasks):
        z_Nxd = np.asarray(bench.base.model.apply(params[t], inputs(task.test))["features"], np.float64)
        np.testing.assert_allclose(outcome.test[t], z_Nxd, rtol=1e-3, atol=1e-4 * np.abs(z_Nxd).max())
        kernel_dxC = np.asarray(bench.heads.kernel[t], np.float64)[:, : CLASSES[t]]
        assert row.accuracy[task.name] == np.mean((z_Nxd @ kernel_dxC).argmax(-1) == task.test.labels)


def test_every_task_is_scored_by_its_own_model(bench, config):
    outcome, row = row_of(bench, config, "emr", {})
    merged = tv.merge("emr", bench.base.pretrained, bench.experts)
    check(bench, outcome, row, [merged.params(t) for t in range(2)])
    assert np.abs(outcome.test[0] - outcome.test[1]).max() > 1e-2
    assert (row.result, row.task_id_needed, row.data_access) == ("task-conditioned", True, "none")
    entries = sum(x.size for x in jax.tree.leaves(bench.base.pretrained))
    assert row.storage_bits == entries * (32 + 32 + 2) + 2 * 32


def log_probs(bench, t):
    kernel_dxC = bench.heads.kernel[t, :, : CLASSES[t]]

    def of(params, batch):
        z_Bxd = bench.base.model.apply(params, batch)["features"]
        cosines_BxC = z_Bxd @ kernel_dxC / jax.numpy.linalg.norm(z_Bxd, axis=-1, keepdims=True)
        return jax.nn.log_softmax(float(bench.heads.scale) * cosines_BxC)

    return of


def direct(name, bench, rows):
    """The extras of a method from rows in one batch a task; the means over rows do not depend on their order."""
    apply_fn = bench.base.model.apply
    if name == "regmean_plusplus":
        again = [lambda batch=batch: [batch] for batch in rows]
        return {"gram": collect.collect_gram_plusplus(apply_fn, bench.base.pretrained, bench.experts, again, ridge=0.1)}
    each = list(enumerate(zip(bench.experts, rows, strict=True)))
    if name == "regmean":
        return {"gram": collect.stack_tasks([collect.collect_gram(apply_fn, p, [x]) for _, (p, x) in each])}
    found = [collect.collect_fisher(log_probs(bench, t), p, [x], estimator="batch") for t, (p, x) in each]
    return {"fisher": collect.stack_tasks(found)}


@pytest.mark.parametrize(
    ("name", "data", "split", "settings"),
    [
        ("fisher", None, "held_out", {"estimator": "batch"}),
        ("regmean", "unlabelled test", "test", {}),
        ("regmean_plusplus", "unlabelled train", "held_out", {"ridge": 0.1}),
    ],
)
def test_statistics_are_collected_from_the_rows_that_data_names(name, data, split, settings, bench, config):
    outcome, row = row_of(bench, config, name, {**settings, **({"data": data} if data else {})})
    extras = direct(name, bench, [inputs(getattr(task, split)) for task in bench.tasks])
    of_method = {key: value for key, value in settings.items() if key != "estimator"}
    merged = tv.merge(name, bench.base.pretrained, bench.experts, extras=extras, **of_method)
    found = trees.flatten(outcome.merged.params_for(1))
    for path, x in trees.flatten(merged).items():
        if name == "fisher" and path.endswith("key/bias"):  # no prediction depends on it: its gradient is rounding
            continue
        np.testing.assert_allclose(found[path], x, rtol=1e-3, atol=1e-4, err_msg=path)
    check(bench, outcome, row, [merged] * 2)
    assert (row.result, row.task_id_needed, row.data_access) == ("static", False, data or "unlabelled train")
    assert row.storage_bits == 32 * sum(x.size for x in found.values())
    assert row.settings.items() >= {"rows": 256, **settings}.items()


def test_a_search_collects_again_only_where_it_must(bench):
    grams_for = collected.collector(bench, "regmean", "unlabelled train")
    first = grams_for({"reduce_nondiagonal": 0.5})
    assert grams_for({"reduce_nondiagonal": 0.9})["gram"] is first["gram"]
    assert grams_for({"rows": 8})["gram"] is not first["gram"]
    outcome = runs.run(bench, "regmean", {"rows": (8, 16), "data": "unlabelled train"}, {})
    assert (outcome.data_access, outcome.settings["searched_rows"]) == ("few labelled", (8, 16))


def test_rows_are_drawn_by_the_seed(bench):
    drawn = lambda seed: collected._batches(bench._replace(seed=seed), "unlabelled train", 5)
    first, again, other = drawn(0), drawn(0), drawn(1)
    assert [len(batch["image"]) for batch in first[0]] == [5] and first[0][0].keys() == {"image"}
    np.testing.assert_array_equal(first[1][0]["image"], again[1][0]["image"])
    assert not np.array_equal(first[1][0]["image"], other[1][0]["image"])


def test_what_cannot_be_collected_is_refused_before_the_work(config, tmp_path):
    def refused(match, label, settings, **changes):
        changed = config.copy_and_resolve_references()
        changed.unlock()
        changed.settings.update({label: settings})
        changed.methods, changed.claims = (label,), ()
        for key, value in changes.items():
            changed[key] = value
        with pytest.raises(ValueError, match=match):
            output.check(changed, tmp_path)

    refused("copa needs lora_a, lora_b, which no rows give: merge by taskvec.merge", "copa", {})
    refused("collect_fisher works with config.heads prompts, class_means, not 'trained'", "fisher", {}, heads="trained")
    refused("collect_gram works with .*trained, not 'answers'", "regmean", {}, heads="answers")
    refused(
        "mine: data is 'test'; allowed: unlabelled test, unlabelled train", "mine", {"method": "fisher", "data": "test"}
    )
    refused("estimator is 'exakt'; allowed: exact, sampled, batch", "fisher", {"estimator": ("exact", "exakt")})
    refused("rows is 0; it is a whole number, 1 or more", "regmean", {"rows": 0})
    refused("no setting 'estimator'", "regmean", {"estimator": "exact"})
    refused("no setting 'data'", "tall_masks", {"data": "unlabelled test"})
    refused("'regmean' must be one static model, and a row of its own", "surgery_v2", {"on": "regmean"})
    refused("'emr' must be one static model", "surgery_v2", {"on": "emr"})
    suite = config.suite.copy_and_resolve_references()
    suite.held_out = 0
    refused("held_out is 0: raise it, or set data='unlabelled test'", "regmean", {}, suite=suite)


def test_cards_name_what_collects():
    named = {m.card.collect for m in registry.methods().values()} - {""}
    assert named == collected.COLLECT.keys() and all(callable(getattr(collect, name)) for name in named)


def test_the_best_static_row_is_one_model_that_needs_no_data(config):
    config = config.copy_and_resolve_references()
    config.methods = tuple(labels := {"weight_average": 1, "tsv_m": 2, "regmean": 3, "tall_masks": 4, "individual": 5})
    config.settings.update({label: {} for label in labels})
    config.claims = (("best static", "individual"),)
    table = output.Table(config)
    for label, right in labels.items():
        accuracy, correct = right / 5, np.arange(5) < right
        table.rows.append(
            rows_lib.Row(
                label=label, method=label, settings={}, model="m", suite="s", protocol="p", data_access="none",
                result="static", task_id_needed=False, head_trained=False, accuracy={"a": accuracy}, seconds=0.0,
                seed=0, config_hash="",
            )
        )  # fmt: skip
        table.correct[label] = [[correct]]
    assert [claim[:3] for claim in table.claims()] == [("tsv_m", "individual", pytest.approx(0.6))]
