"""Result rows: round trip, checks, normalised accuracy, refusal to mix protocols."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from taskvec.evaluation import rows as rows_lib

FIELDS = {
    "label": "ties", "method": "ties", "settings": {"density": 0.2, "scale": np.float32(0.5), "grid": (1, 2)},
    "model": "m", "suite": "s", "protocol": "p", "data_access": "none", "result": "static", "task_id_needed": False,
    "head_trained": False, "accuracy": {"a": 0.6, "b": 0.8}, "seconds": 1.5, "seed": 0, "config_hash": "0" * 12,
}  # fmt: skip


def test_round_trip():
    text = rows_lib.dumps([rows_lib.Row(**FIELDS), rows_lib.Row(**{**FIELDS, "seed": 1})])
    found = rows_lib.loads(text)
    assert [row.seed for row in found] == [0, 1] and found[0].accuracy == FIELDS["accuracy"]
    assert found[0].settings == {"density": 0.2, "scale": 0.5, "grid": [1, 2]}
    line = json.loads(text.splitlines()[0])
    assert line["mean_accuracy"] == pytest.approx(0.7) and line["peak_memory_mb"] > 10
    assert {"taskvec", "jax", "numpy", "python", "device"} == line["versions"].keys()
    assert rows_lib.loads(rows_lib.dumps(found)) == found


def test_values_are_checked():
    with pytest.raises(ValueError, match="allowed: none, unlabelled test, unlabelled train, few labelled"):
        rows_lib.Row(**{**FIELDS, "data_access": "test"})
    with pytest.raises(ValueError, match="task-conditioned"):
        rows_lib.Row(**{**FIELDS, "result": "dynamic"})
    with pytest.raises(ValueError, match="fractions"):
        rows_lib.Row(**{**FIELDS, "accuracy": {"a": 60.0}})
    with pytest.raises(ValueError, match="line 2"):
        rows_lib.loads(rows_lib.Row(**FIELDS).to_json() + '\n{"label": 1}\n')


def test_normalised_accuracy_is_the_mean_of_ratios_within_a_seed():
    rows = [
        rows_lib.Row(**{**FIELDS, "seed": seed, "label": label, "accuracy": accuracy})
        for seed, label, accuracy in [
            (0, "ties", {"a": 0.6, "b": 0.8}),
            (0, "individual", {"a": 0.75, "b": 1.0}),
            (1, "ties", {"a": 0.6, "b": 0.8}),
        ]
    ]
    found = rows_lib.with_normalised(rows)
    assert found[0].normalised_accuracy == pytest.approx((0.6 / 0.75 + 0.8) / 2)
    assert found[1].normalised_accuracy == 1 and found[2].normalised_accuracy is None


def test_protocols_do_not_mix():
    row = rows_lib.Row(**FIELDS)
    rows_lib.check_same_protocol([row, row])
    for field in ("protocol", "suite", "model"):
        with pytest.raises(ValueError, match="not comparable"):
            rows_lib.check_same_protocol([row, dataclasses.replace(row, **{field: "other"})])


def test_config_hash():
    a = rows_lib.config_hash({"x": 1, "y": {"z": (1, 2)}})
    assert a == rows_lib.config_hash({"y": {"z": [1, 2]}, "x": np.int64(1)}) and len(a) == 12
    assert a != rows_lib.config_hash({"x": 2, "y": {"z": jnp.array([1, 2])}})
