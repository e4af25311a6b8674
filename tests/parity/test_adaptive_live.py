"""FusionBench as installed does what was recorded of it; tests/adaptive/test_fusionbench.py compares that with ours.

FusionBench and jax need not be in one environment: TASKVEC_FUSIONBENCH_PYTHON may name a Python that has FusionBench.
"""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = os.environ.get("TASKVEC_FUSIONBENCH_PYTHON", "")
if not PYTHON:
    pytest.importorskip("fusion_bench", reason="needs fusion-bench, or TASKVEC_FUSIONBENCH_PYTHON")


def test_fresh_numbers_are_the_recorded_ones(tmp_path):
    command = [PYTHON or sys.executable, "-m", "tests.parity.record_adaptive", "--out", str(tmp_path / "fresh.npz")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with np.load(tmp_path / "fresh.npz") as fresh, np.load(ROOT / "tests/adaptive/recorded/fusionbench.npz") as kept:
        assert fresh.files == kept.files
        for name in kept.files:
            if kept[name].dtype.kind == "f":
                np.testing.assert_allclose(fresh[name], kept[name], atol=1e-5, rtol=1e-5, err_msg=name)
            else:
                np.testing.assert_array_equal(fresh[name], kept[name], err_msg=name)
