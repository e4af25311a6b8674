"""Every experiment in its form of seconds, on real weights, through the functions that the mains call."""

import json

import numpy as np
import pytest
from PIL import Image

from configs import quickstart, text4, text8, vision5
from experiments import benchmark, finetune, output, prepare
from taskvec import models
from taskvec.evaluation import rows as rows_lib
from taskvec.io import coefficients


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """Weights and data from the usual cache, experts from an empty one."""
    monkeypatch.setattr(prepare, "EXPERTS", tmp_path / "experts")


def check_results(config, workdir):
    rows = rows_lib.loads((workdir / "result.jsonl").read_text())
    assert [row.label for row in rows if row.seed == 0] != [] and {r.label for r in rows} == set(config.methods)
    assert all(row.normalised_accuracy is not None for row in rows)
    individual = {row.label: row for row in rows}["individual"]
    assert individual.task_id_needed and individual.normalised_accuracy == 1
    report = (workdir / "report.md").read_text()
    assert all(f"| {label} |" in report for label in config.methods) and "standard error" in report
    for figure in ("accuracy.png", "coefficients_adamerging.png"):
        with Image.open(workdir / figure) as image:
            assert min(image.size) > 200
    found = coefficients.load(workdir / "coefficients_adamerging")
    assert found.values.shape == (len(found.groups), len(found.tasks)) and found.method == "adamerging"
    return {row.label: row for row in rows}


def test_text4_runs_every_method(tmp_path, fresh_cache):
    config = text4.get_config("runlocal")
    slow = ("regmean_plusplus", "emr", "tsv_compress")  # see test_merged_rows
    config.methods = tuple(label for label in config.methods if label not in slow)
    benchmark.benchmark(config, tmp_path / "out")
    rows = check_results(config, tmp_path / "out")
    assert rows["ties"].data_access == "few labelled" and rows["tsv_m"].data_access == "none"
    assert rows["surgery"].data_access == "unlabelled test"
    assert rows["surgery_inductive"].data_access == "unlabelled train"
    assert rows["regmean"].data_access == "unlabelled train"
    masked = rows["tall_masks"]
    assert (masked.result, masked.task_id_needed, masked.data_access) == ("task-conditioned", True, "none")
    assert masked.storage_bits > rows["tsv_m"].storage_bits


def test_quickstart_and_its_cache(tmp_path, fresh_cache, capsys):
    config = quickstart.get_config("runlocal")
    config.methods = tuple(m for m in config.methods if m not in ("ties", "tsv_m", "task_arithmetic"))
    config.settings.surgery.on = config.settings.surgery_inductive.on = "weight_average"
    benchmark.benchmark(config, tmp_path / "out")
    first = check_results(config, tmp_path / "out")
    capsys.readouterr()
    config.methods = ("pretrained", "individual")
    config.claims = (("pretrained", "individual"),)
    benchmark.benchmark(config, tmp_path / "again")
    assert capsys.readouterr().err.count("from the cache") == 3
    again = {r.label: r for r in rows_lib.loads((tmp_path / "again" / "result.jsonl").read_text())}
    assert again["individual"].accuracy == first["individual"].accuracy


def test_suites_from_a_folder(tmp_path, fresh_cache, capsys):
    """text8 on little files of our own, through experiments.finetune; vision5 as far as its tasks load."""
    rng = np.random.default_rng(0)
    for name in text8.TASKS:
        rows = [
            {"split": split, "text": f"{['good', 'bad'][i % 2]} thing number {rng.integers(10**6)}", "label": i % 2}
            for split, n in (("train", 60), ("test", 20))
            for i in range(n)
        ]
        (tmp_path / f"text_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = text8.get_config(f"runlocal,source={tmp_path}")
    config.suite.tasks = config.suite.tasks[:2]
    finetune.finetune(config, tmp_path / "experts")
    _, tuned = models.load(tmp_path / "experts" / "seed0" / "subj")
    _, pretrained = models.load(tmp_path / "experts" / "pretrained")
    assert not np.array_equal(tuned["blocks"]["mlp"]["up"]["kernel"], pretrained["blocks"]["mlp"]["up"]["kernel"])
    base = prepare.load_base(config)
    config.suite.tasks = config.suite.tasks[:1]
    prepare.prepare(config, base, 0)  # puts it into the cache
    capsys.readouterr()
    finetune.finetune(config, tmp_path / "copied")
    assert "fine-tuning" not in capsys.readouterr().err
    _, copied = models.load(tmp_path / "copied" / "seed0" / "subj")
    np.testing.assert_array_equal(copied["blocks"]["mlp"]["up"]["kernel"], tuned["blocks"]["mlp"]["up"]["kernel"])
    with pytest.raises(FileNotFoundError, match="does not exist; set source to a folder"):
        output.check(vision5.get_config("source=nowhere"), tmp_path)


def test_mistakes_are_reported_before_the_work(tmp_path):
    def refused(error, match, **changes):
        config = text4.get_config("runlocal")
        config.unlock()
        for key, value in changes.items():
            config[key] = value
        with pytest.raises(error, match=match):
            output.check(config, tmp_path)

    refused(ValueError, "names 'tise'", methods=("tise",))
    settings = text4.get_config().settings
    settings.ties = {"densty": 0.2}
    refused(ValueError, "did you mean 'density'", settings=settings)
    settings = text4.get_config().settings
    settings.ties = {"density": (0.2, 20)}
    refused(ValueError, "a percentage is written 0.2", settings=settings)
    settings = text4.get_config().settings
    settings.adamerging.data = "unlabeled test"
    refused(ValueError, "allowed: unlabelled test, unlabelled train", settings=settings)
    settings = text4.get_config().settings
    settings.adamerging.mode = "tensr"
    refused(ValueError, "settings.adamerging: adamerging: unknown mode 'tensr'; allowed: global, ", settings=settings)
    settings = text4.get_config().settings
    settings.surgery = {"data": "unlabelled test", "on": "ties", "stpes": 3}
    refused(ValueError, "unknown settings .'stpes'", settings=settings)
    suite = {**text4.get_config("runlocal").suite, "held_out": 0}
    refused(
        ValueError,
        "adamerging_inductive has data='unlabelled train', held-out",
        suite=suite,
        methods=("adamerging_inductive",),
    )
    settings = text4.get_config().settings
    settings.surgery_inductive.on = "adamerging"
    refused(ValueError, "surgery_inductive has .* but stands on 'adamerging', which sees test rows", settings=settings)
    settings = text4.get_config().settings
    settings.adamerging = {"method": "symerge", "data": "unlabelled test"}
    refused(ValueError, "surgery stands on 'adamerging', whose heads", settings=settings)
    refused(ValueError, "builds on 'adamerging', which is not in config.methods", methods=("surgery", "individual"))
    refused(ValueError, "config.claims names", claims=(("pretrained", "nothing"),))
    with pytest.raises(FileNotFoundError, match="neither minilm nor efficientnet_lite0 nor an existing path"):
        prepare.model_folder("minilmm")
