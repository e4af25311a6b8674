"""The configs of adaptive methods resolve for every model and suite, and run through the benchmark's own function."""

import contextlib
import importlib
import json
import pathlib

import jax
import numpy as np
import pytest

from configs import adaptive, clip, text8
from experiments import benchmark, few_shot_heads, learning, output, prepare, resume, runs
from taskvec import tree as trees
from taskvec.adaptive import registry
from taskvec.data import clip_suites
from taskvec.data.base import take
from taskvec.io import coefficients
from taskvec.io.checkpoints import Checkpoint
from taskvec.modular import results
from tests.experiments import published as stand_ins

NAMES = sorted(path.stem for path in pathlib.Path(adaptive.__file__).parent.glob("*.py") if path.stem != "__init__")
LONG_TO_COMPILE = ("concrete_adamerging",)


def module(name: str):
    return importlib.import_module(f"configs.adaptive.{name}")


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    root = stand_ins.write(tmp_path_factory.mktemp("published"))
    (root / "texts").mkdir()
    for task in text8.TASKS:
        (root / "texts" / f"text_{task}.jsonl").touch()
    return root


@pytest.fixture(scope="module")
def bench(stand_in):
    config = clip.get_config(stand_ins.arguments(stand_in))
    return prepare.prepare(config, prepare.load_base(config), 0)


@pytest.fixture(scope="module")
def done(bench):
    """Runs that others stand on."""
    return {label: runs.run(bench, label, {}, {}) for label in ("pretrained", "weight_average", "individual")}


def config_of(name: str, root):
    if name == "self_positioning":
        return module(name).get_config(f"source={root / 'texts'},runlocal")
    return module(name).get_config(stand_ins.arguments(root))


def own(config) -> list[str]:
    return [label for label in config.methods if label not in ("pretrained", "weight_average", "individual")]


def one_a_method(name: str) -> list:
    """The first row of every method of a config that others do not stand on."""
    config = module(name).get_config("" if name == "self_positioning" else f"tasks={'+'.join(stand_ins.TASKS)}")
    found, below = {}, {config.settings[label].get("on") for label in own(config)}
    for label in own(config):
        if label not in below:
            found.setdefault(output.method_of(config, label), label)
    slow = [pytest.mark.slow]
    return [pytest.param(name, x, marks=slow if x in LONG_TO_COMPILE else []) for x in found.values()]


def run(bench, config, label, done):
    settings = config.settings[label]
    if settings.get("on") not in (None, *done):
        done = {**done, settings["on"]: run(bench, config, settings["on"], done)}
    outcome = runs.run(bench, label, settings, done)
    assert len(outcome.test) == len(bench.tasks)
    for t, (features, task) in enumerate(zip(outcome.test, bench.tasks, strict=True)):
        assert features.shape == (len(task.test.labels), bench.heads.kernel.shape[1])
        assert np.isfinite(features).all()
        assert outcome.scorer(bench).score(t, features, task.test.labels).shape == task.test.labels.shape
    assert outcome.head_trained == (output.method_of(config, label) in ("symerge", *few_shot_heads.SETTINGS))
    return outcome


def test_every_method_has_a_config(stand_in):
    configs = [config_of(name, stand_in) for name in NAMES]
    found = {output.method_of(config, label) for config in configs for label in own(config)}
    assert found - {"task_arithmetic", "ties"} == registry.methods().keys() | few_shot_heads.SETTINGS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_it_passes_the_checks(name, stand_in, tmp_path):
    config = config_of(name, stand_in)
    output.check(config, tmp_path)
    assert config.methods[-1] == "individual" and "python -m experiments.benchmark" in module(name).__doc__
    if name == "self_positioning":
        return output.check(module(name).get_config(f"source={stand_in / 'texts'}"), tmp_path)
    for arch in clip.ARCHITECTURES:
        for suite in clip_suites.SUITES:
            whole = module(name).get_config(f"arch={arch},suite={suite}")
            output.check(whole, tmp_path)
            assert len(whole.suite.tasks) == len(clip_suites.SUITES[suite])
    return None


@pytest.mark.parametrize(("name", "label"), [case for name in NAMES for case in one_a_method(name)])
def test_one_row_a_method_runs(name, label, stand_in, bench, done):
    config = config_of(name, stand_in)
    if name != "self_positioning":  # made for texts; its row runs on pictures as well
        assert (config.suite, config.checkpoints) == (bench.config.suite, bench.config.checkpoints)
    assert run(bench, config, label, done).data_access == config.settings[label].data


def test_pieces_change_nothing(bench, done):
    settings = {"method": "adamerging", "steps": 2, "per_task": 4, "learning_rate": 0.1}
    whole, halves = (runs.run(bench, "a_row", {**settings, "pieces": n}, done).coefficients[""] for n in (1, 2))
    np.testing.assert_allclose(halves.values, whole.values, atol=1e-5)
    assert np.ptp(whole.values) > 0.05
    for wrong in (3, 0, 0.5):
        with pytest.raises(ValueError, match=f"a_row: pieces={wrong} must be a whole number that divides per_task, 4"):
            learning.check("a_row", "adamerging", {**settings, "pieces": wrong}, bench.config.suite)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_all_rows_run(name, stand_in, bench, done):
    config, mine = config_of(name, stand_in), dict(done)
    for label in output.in_order(config):
        if label not in mine:
            mine[label] = run(bench, config, label, mine)


def test_access_is_to_what_is_looked_at(bench, done, monkeypatch):
    monkeypatch.setattr(runs.learning, "learn", lambda *args: learning.Found(results.static(bench.base.pretrained)))
    access = lambda **settings: runs.run(bench, "fw_soft", settings, done).data_access
    assert access() == "unlabelled test" and access(adapt="unlabelled train") == "few labelled"
    assert access(objective="cross_entropy") == "few labelled"  # of labelled rows, whatever `adapt` says


def test_surgery_v2_stands_on_an_earlier_run(stand_in, done, tmp_path, monkeypatch):
    def stop(bench, name, data, settings, checkpoint, teacher):
        raise LookupError(settings, teacher)

    monkeypatch.setattr(runs.learning, "learn", stop)
    for on, weights in (("mine", done["weight_average"].merged.params_for(0)), ("ties", "ties")):
        with pytest.raises(LookupError) as found:
            runs.run(None, "surgery_v2", {"on": on}, {"mine": done["weight_average"]})
        assert found.value.args[0]["on"] is weights and found.value.args[1] is None
    for data, features in (
        ("unlabelled test", done["individual"].test),
        ("unlabelled train", done["individual"].held_out()),
    ):
        with pytest.raises(LookupError) as found:  # taught by features that are there already
            runs.run(None, "divmerge", {"data": data}, {"individual": done["individual"]})
        assert found.value.args[1] is features
    config = config_of("surgery_v2", stand_in)
    config.methods = ("surgery_v2", "adamerging", "individual")
    config.claims = ()
    with pytest.raises(ValueError, match="stands on 'adamerging', which must be one static model and come before it"):
        output.check(config, tmp_path)
    config.settings.surgery_v2.on = "individual"
    with pytest.raises(ValueError, match="stands on 'individual'"):
        output.check(config, tmp_path)
    config.settings.surgery_v2.on = "tise"
    with pytest.raises(ValueError, match="unknown method 'tise'"):
        output.check(config, tmp_path)


def test_a_killed_row_goes_on(bench, done, tmp_path, monkeypatch):
    """Fitted task by task, killed within the second fit: the same bits, without the steps that were done."""
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    seen, saved, save = [], [], Checkpoint.save

    @contextlib.contextmanager
    def bar(title):
        yield lambda step, text="", total=None: seen.append(step) if text else None

    def killed(self, step, state):
        save(self, step, state)
        saved.append(step)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(learning, "bar", bar)
    steps = {"epochs": 4, "least_batches": 1, "batch_size": 64, "shots": 2}
    settings = {"method": "atlas_few_shot", "data": "few labelled", **steps}
    run = lambda kept: runs.run(bench, "x", settings, {}, kept)
    whole = run(None)
    assert seen == [4, 8, 4, 8]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(resume.Seed(tmp_path, bench))
    assert saved == [4, 8, 4]
    folder = resume.Seed(tmp_path, bench).folder("x")
    assert 0 < json.loads((folder / "seconds.json").read_text()) < 600
    (folder / "seconds.json").write_text("1000.0")
    seen.clear()
    found = run(resume.Seed(tmp_path, bench))
    assert seen == [8] and found.seconds > 1000
    for t in range(2):
        jax.tree.map(np.testing.assert_array_equal, found.merged.params_for(t), whole.merged.params_for(t))
        assert not np.array_equal(found.test[t], done["pretrained"].test[t])


def test_no_other_row_takes_a_checkpoint(stand_in, bench, tmp_path):
    other = clip.get_config(stand_ins.arguments(stand_in))
    other.settings.ties.density = 0.3
    cut = bench.tasks[0]._replace(test=take(bench.tasks[0].test, np.arange(3)))
    others = [
        bench._replace(config=other),
        bench._replace(seed=1),
        bench._replace(experts=bench.experts[::-1]),
        bench._replace(tasks=[cut, bench.tasks[1]]),
    ]
    folders = [resume.Seed(tmp_path, each).folder("x") for each in (bench, *others)]
    assert len({*folders, resume.Seed(tmp_path, bench).folder("y")}) == 6
    assert resume.Seed(tmp_path, bench).folder("x") == folders[0]


def test_a_benchmark_leaves_results_and_no_checkpoints(stand_in, bench, done, tmp_path, monkeypatch):
    groups = trees.groups(bench.base.pretrained, "module").names
    values = np.random.default_rng(0).normal(0.3, 0.4, (len(groups), 2, 3)).astype(np.float32)

    def run(bench, label, settings, done_, kept):
        kept.folder(label).mkdir(parents=True)
        table = learning.CoefficientTable(values, groups, [task.name for task in bench.tasks])
        known = {"": table} if label == "pretrained" else {"mine": table._replace(values=values[..., 0])}
        return done[label]._replace(coefficients=known)

    config = clip.get_config(stand_ins.arguments(stand_in))
    config.methods, config.claims, config.seeds = ("pretrained", "individual"), (), (bench.seed, bench.seed + 1)
    monkeypatch.setattr(benchmark, "load_base", lambda config: None)
    monkeypatch.setattr(benchmark, "prepare", lambda config, base, seed: bench._replace(seed=seed))
    monkeypatch.setattr(runs, "run", run)
    benchmark.benchmark(config, tmp_path)
    stems = [f"{row}{seed}" for row in ("individual_mine", "pretrained") for seed in ("", f"_seed{bench.seed + 1}")]
    names = [f"coefficients_{stem}.{kind}" for stem in stems for kind in ("json", "npz", "png")]
    wanted = ["accuracy.png", *names, "report.md", "result.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == wanted
    found = coefficients.load(tmp_path / "coefficients_pretrained")
    np.testing.assert_array_equal(found.values, values)
    assert found.drawn == (3, bench.seed, False)
