"""Fine-tunes or loads experts, merges them by a list of methods, evaluates, and writes rows, a table and figures.

    python -m experiments.benchmark --config=configs/vision3.py --workdir=results/vision3

Leaves ``result.jsonl`` (one row per method and seed), ``report.md``, ``accuracy.png`` and, of every method that learns
coefficients, ``coefficients_LABEL`` as npz, json and png: for each task, ``coefficients_LABEL_TASK``, where each is
learned from the others' vectors, and of further seeds ``coefficients_LABEL_seed1``. Every method sees the same rows,
heads and experts; what it may look at stands in its row.

One that was killed begins anew, but goes on within the rows that learn coefficients, masks, heads or adapters.

With ``--distributed``, in every process of a pod or cluster, each runs its part of the rows through the models that are
scored; merging and adapting is not divided. Experts must exist.
"""

import pathlib
import time

import jax
from absl import app

from experiments import memory, output, resume, runs, setup
from experiments.prepare import load_base, prepare
from taskvec.evaluation import scorers
from taskvec.io.progress import say


def main(argv):
    """Runs the benchmark of a config."""
    benchmark(*setup.start(argv))


def benchmark(config, workdir: pathlib.Path) -> None:
    """The benchmark as a function of a config and a folder."""
    output.check(config, workdir)
    start, table = time.perf_counter(), output.Table(config)
    base = load_base(config)
    stood_on = {"individual", *(config.settings[label].get("on") for label in config.methods)}
    for seed in config.seeds:
        bench = prepare(config, base, seed)
        done: dict[str, runs.Outcome] = {}
        kept = resume.Seed(workdir, bench)
        for label in output.in_order(config):
            memory.forget_peak()
            try:
                done[label] = runs.run(bench, label, config.settings[label], done, kept)
                say(table.add(bench, label, done[label]))
                if label not in stood_on:
                    del done[label]  # frees its models
            except scorers.NotFinite as error:
                raise ValueError(
                    f"{label}, seed {seed}, task {bench.tasks[error.task].name}: no score. Give {label} smaller scales "
                    f"or steps, or leave it out of config.methods to have the other rows. {error}"
                ) from error
        if jax.process_index() == 0:
            table.write(workdir)  # after every seed, so that a run cut short leaves what it has
    resume.forget(workdir)
    say(f"done in {time.perf_counter() - start:.0f} s; results in {workdir}")


if __name__ == "__main__":
    app.run(main)
