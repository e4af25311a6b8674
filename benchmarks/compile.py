"""Seconds that every adaptive method compiles for on CLIP's ViT-B/32 tower with eight tasks.

    python -m benchmarks.compile [--case minilm] [--only adamerging,fw_soft]

Each method runs its shortest form (a step, a round, an epoch, a row per task), in a process of its own, without
programs kept from earlier runs. Compilation does not depend on the number of steps. Printed are the seconds of the
whole run; those of tracing, lowering and compiling, all programs together; the number of programs, and of those that
took over a second; and, for methods that run for one task after the other, the number that the second task adds.
"""

import argparse
import json
import sys
import time
from typing import Any

import jax
import numpy as np
import rich
import rich.table

from benchmarks import adaptive, peers
from experiments import learning
from taskvec.adaptive import registry, rows as rows_lib
from taskvec.adaptive.learn import Problem, heads_of

SHORTEST = {
    "steps": 1, "coefficient_steps": 1, "rounds": 1, "epochs": 1, "per_task": 1, "per_set": 1, "batch_size": 4,
    "shots": 1, "least_batches": 1, "budget": None, "per_class": 1, "head_epochs": 1,
}  # fmt: skip
STAGES = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")
COLUMNS = ("seconds", "compiling", "programs", "over_a_second", "second_task")


def main() -> None:
    """Prints a table, or with ``--run`` one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=tuple(adaptive.CASES), default="b32")
    parser.add_argument("--only", type=lambda text: text.split(","), default=sorted(registry.methods()))
    parser.add_argument("--run", action="store_true", help="the one method of --only, in this process")
    args = parser.parse_args()
    if args.run:
        print("RESULT " + json.dumps(run(args.case, args.only[0])), flush=True)
        return
    found = {}
    for name in args.only:
        command = [sys.executable, "-m", "benchmarks.compile", "--case", args.case, "--only", name, "--run"]
        found[name] = peers.watch(command)
        rich.print(name, found[name])
    table = rich.table.Table("method", *COLUMNS)
    for name, values in found.items():
        none = "" if "seconds" in values else "failed"
        table.add_row(name, *(f"{values[column]:.4g}" if column in values else none for column in COLUMNS))
    rich.print(table)


def run(case: str, name: str) -> dict[str, Any]:
    """One method's shortest run."""
    (problem, rows), *later = arranged(name, case)
    given = {key: SHORTEST[key] for key in registry.get(name).defaults if key in SHORTEST}
    if name == "lorahub":
        given["budget"] = 20
    if name == "fw_soft":
        given["adapt"] = rows._replace(labels=None)
    took: list[tuple[str, float]] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: took.append((event, seconds)))
    jax.block_until_ready((problem.theta0, problem.tau))
    took.clear()
    start = time.perf_counter()
    jax.block_until_ready(registry.get(name)(problem, rows, **given).params)
    seconds = time.perf_counter() - start
    stages = [(event.split("/")[-1], seconds) for event, seconds in took]
    compiled = [seconds for stage, seconds in stages if stage == STAGES[-1]]
    found = {
        "seconds": seconds,
        "compiling": sum(seconds for stage, seconds in stages if stage in STAGES),
        "programs": len(compiled),
        "over_a_second": sum(seconds > 1 for seconds in compiled),
    }
    for again in later:
        took.clear()
        registry.get(name)(*again, **given)
        found["second_task"] = sum(event.endswith(STAGES[-1]) for event, _ in took)
    return found


def arranged(name: str, case: str) -> list[tuple[Problem, rows_lib.Rows]]:
    """The problem and the rows that a method takes; of two tasks where it runs for one after the other."""
    args = argparse.Namespace(case=case, tasks=8, per_task=1, tau="float32", compute="float32")
    problem, rows = adaptive.made(args)
    card = registry.get(name).card
    if card.data == "few labelled" or "pairs" in card.sees:
        rows = rows._replace(labels=[np.arange(count) % 2 for count in rows.counts])
    if card.learns == "one target":
        own, second = learning.one_out(problem, 0), heads_of(problem.heads, [1])
        return [(own, rows.only([0])), (own._replace(heads=second), rows.only([1]))]  # one pool, for memory's sake
    if card.learns == "target and control":
        return [(learning.negation(problem, 0, 1), rows.only([0, 1]))]
    return [(problem, learning.pairs(rows, 0) if "pairs" in card.sees else rows)]


if __name__ == "__main__":
    main()
