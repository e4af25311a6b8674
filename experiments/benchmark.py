"""Fine-tunes or loads experts, merges them by a list of methods, evaluates, and writes rows, a table and figures.

    python -m experiments.benchmark --config=configs/vision3.py --workdir=results/vision3

Leaves ``result.jsonl`` (one row a method and seed), ``report.md``, ``accuracy.png``, ``coefficients.png`` and
``coefficients.npz``. Every method sees the same rows, heads and experts; what a method may look at stands in its row.
"""

import logging
import pathlib
import time

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags
from rich.logging import RichHandler

from experiments import output, runs
from experiments.prepare import load_base, prepare
from taskvec.data import wheels
from taskvec.io.progress import console, say

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/FILE.py[:ARGS]", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "folder for the results")


def main(argv):
    """Runs the benchmark of a config."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; config values are set as --config.key=value")
    absl.logging.set_verbosity(absl.logging.WARNING)
    log = logging.getLogger("taskvec")
    log.addHandler(RichHandler(console=console, show_time=False, show_level=False, show_path=False))
    log.propagate = False
    log.setLevel(logging.INFO)
    # Compiled programs are kept between runs and seeds; without this every loop would compile anew.
    jax.config.update("jax_compilation_cache_dir", str(wheels.cache() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    benchmark(CONFIG.value, pathlib.Path(WORKDIR.value or f"results/{CONFIG.value.name}"))


def benchmark(config, workdir: pathlib.Path) -> None:
    """The benchmark as a function of a config and a folder."""
    output.check(config, workdir)
    start, table = time.perf_counter(), output.Table(config)
    base = load_base(config)
    for seed in config.seeds:
        bench = prepare(config, base, seed)
        done: dict[str, runs.Outcome] = {}
        for label in output.in_order(config):
            done[label] = runs.run(bench, label, config.settings[label], done)
            say(table.add(bench, label, done[label]))
    table.write(workdir)
    say(f"done in {time.perf_counter() - start:.0f} s; results in {workdir}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
