"""The configs of adaptive methods resolve for every model and suite, and run through the benchmark's own function."""

import importlib
import pathlib

import jax
import numpy as np
import pytest

from configs import adaptive, clip, text8
from experiments import few_shot_heads, output, prepare, runs
from taskvec.adaptive import registry
from taskvec.data import clip_suites
from tests.experiments import published as stand_ins

NAMES = sorted(path.stem for path in pathlib.Path(adaptive.__file__).parent.glob("*.py") if path.stem != "__init__")
LONG_TO_COMPILE = ("concrete_adamerging",)


def module(name: str):
    return importlib.import_module(f"configs.adaptive.{name}")


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """Programs that run for two steps are not worth optimising."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_all_rows_run(name, stand_in, bench, done):
    config, mine = config_of(name, stand_in), dict(done)
    for label in output.in_order(config):
        if label not in mine:
            mine[label] = run(bench, config, label, mine)


def test_surgery_v2_stands_on_an_earlier_run(stand_in, done, tmp_path, monkeypatch):
    def stop(bench, name, data, settings):
        raise LookupError(settings)

    monkeypatch.setattr(runs.learning, "learn", stop)
    for on, weights in (("mine", done["weight_average"].merged.params_for(0)), ("ties", "ties")):
        with pytest.raises(LookupError) as found:
            runs.run(None, "surgery_v2", {"on": on}, {"mine": done["weight_average"]})
        assert found.value.args[0]["on"] is weights
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
