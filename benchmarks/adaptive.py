"""Seconds and memory of adaptive merging: a step of layer-wise AdaMerging, and what it is made of.

    python -m benchmarks.adaptive b32 [--tasks 8 --per-task 16 --pieces 2 --tau bfloat16 --compute bfloat16]
    python -m benchmarks.adaptive b32 --peers SCRIPTS --work WORK --fusionbench PYTHON --repeats 2
    python -m benchmarks.adaptive minilm | sentences | surgery

Cases: ``b32`` is CLIP's ViT-B/32 image tower (87.5 M parameters), ``l14`` its large one, ``minilm`` the MiniLM-L6
encoder on 48 tokens (no padding), ``sentences`` the same on sentences of 3 to 48 tokens, 22 on average as in eight sets
of real ones, packed; all with random weights and inputs. ``surgery`` trains Surgery's published 1,000 steps
over 8 tasks on cached features. A run is a process of its own. It prints the median of its steps, the time of the
first, with compilation, and of all of them, and the peak of resident memory above theta0 and the task vectors; beside
it, timed afterwards in the same process, a plain gradient step: forward and backward by all parameters of the same
model, on the same rows and heads. With ``--peers`` FusionBench runs its own loop in turns with ours (``b_ada.py STEPS``
in the folder SCRIPTS).
"""

import argparse
import functools
import gc
import json
import pathlib
import statistics
import sys
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich
import rich.table

from benchmarks import finetune, peers, tower
from experiments import pretrain
from taskvec import tree as trees
from taskvec.adaptive import adamerging, objectives, rows as rows_lib
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import Problem, outputs_of
from taskvec.data import packing
from taskvec.models import bert, clip
from taskvec.modular import surgery
from taskvec.training import heads as heads_lib

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CASES = {
    "b32": finetune.CLIP,
    "l14": {**finetune.CLIP, **LARGE, "patch_size": 14},
    "minilm": finetune.MINILM,
    "sentences": finetune.MINILM,
}
CLASSES = (397, 196, 45, 10, 10, 43, 10, 47)  # of the eight image tasks
TOKENS = 48


def main() -> None:
    """Prints a table, or with ``--run`` one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=(*CASES, "surgery"))
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--per-task", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="timed ones, after the first")
    parser.add_argument("--pieces", type=int, default=1, help="see Loop.pieces")
    parser.add_argument("--tau", default="float32", help="dtype of task vectors")
    parser.add_argument("--compute", default="float32", help="dtype of the forward pass")
    parser.add_argument("--repeats", type=int, default=1, help="processes a side, in turns")
    parser.add_argument("--peers", type=pathlib.Path, help="folder of the peer's scripts")
    parser.add_argument("--work", type=pathlib.Path, help="folder of the peer's models")
    parser.add_argument("--fusionbench", help="a Python with fusion-bench")
    parser.add_argument("--run", action="store_true", help="one run of ours, in this process")
    args = parser.parse_args()
    if args.run:
        print("RESULT " + json.dumps(surgery_run() if args.case == "surgery" else run(args)), flush=True)
        return
    own = [
        f"--{name.replace('_', '-')}={getattr(args, name)}"
        for name in ("tasks", "per_task", "steps", "pieces", "tau", "compute")
    ]
    command = [sys.executable, "-m", "benchmarks.adaptive", args.case, *own, "--run"]
    sides = {"taskvec": lambda: peers.watch(command)}
    if args.peers:
        script, env = args.peers / "b_ada.py", {"PEERS_DIR": str(args.work), "PYTHONPATH": str(args.peers)}
        sides["FusionBench"] = lambda: _peer(peers.watch([args.fusionbench, script, args.steps + 1], env))
    found = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, side in sides.items():
            found[name].append(side())
            rich.print(name, found[name][-1])
    rich.print(table(found))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One run of ours: seconds and megabytes."""
    problem, rows = made(args)
    apply_fn = problem.apply_fn
    batch = jax.tree.map(jnp.asarray, rows_lib.together(rows, args.per_task)(0))

    def plain(theta0, heads, batch):
        def loss(params):
            outputs = outputs_of(heads, None, apply_fn(params, batch, remat="dots")["features"], batch)
            return objectives.entropy(outputs.logits).sum()

        return jax.value_and_grad(loss)(theta0)

    plain = jax.jit(plain)
    ours = []
    jax.block_until_ready((problem.theta0, problem.tau))
    gc.collect()
    held = tower.memory("VmRSS")
    loop = Loop(chunk=1, pieces=args.pieces, on_chunk=lambda step, metrics: ours.append(time.perf_counter()))
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    adamerging(problem, rows, steps=args.steps + 1, per_task=args.per_task, loop=loop)
    peak = tower.memory("VmHWM")
    steps = np.diff([start, *ours])
    plains = []
    for _ in range(min(args.steps, 4) + 1):
        before = time.perf_counter()
        jax.block_until_ready(plain(problem.theta0, problem.heads, batch))
        plains.append(time.perf_counter() - before)
    return {
        "first": float(steps[0]),
        "step": float(np.median(steps[1:])),
        "total": float(steps.sum()),
        "plain": statistics.median(plains[1:]),
        "extra_mb": round(peak - held),
        "held_mb": round(held),
        "device": jax.devices()[0].device_kind,
    }


def made(args: argparse.Namespace) -> tuple[Problem, rows_lib.Rows]:
    """A random problem of a case."""
    fields = CASES[args.case]
    is_text = fields["model_type"] == "bert"
    model = bert.make(bert.Config.from_json(fields)) if is_text else clip.make(clip.from_json(fields))
    theta0, rng = pretrain.initial(model, jax.random.key(0)), np.random.default_rng(0)
    tau = trees.map_with_path(functools.partial(_noise, args.tasks, args.tau), model.abstract)
    kernels = [rng.standard_normal((model.feature_dim, CLASSES[t % 8])) for t in range(args.tasks)]
    heads = heads_lib.make_heads([k / np.linalg.norm(k, axis=0) for k in kernels], 100.0)
    rows = sentences(args, rng) if args.case == "sentences" else random_rows(args, fields)
    options = {} if args.compute == "float32" else {"dtype": jnp.dtype(args.compute)}
    apply_fn = lambda params, batch, **how: model.apply(params, batch, **{**options, **how})
    return Problem(apply_fn, theta0, tau, heads, True), rows


def random_rows(args: argparse.Namespace, fields: dict[str, Any]) -> rows_lib.Rows:
    """Twice as many rows as a step takes."""
    one = lambda: jax.tree.map(np.asarray, finetune.random_batch(fields, 2 * args.per_task, TOKENS))
    return rows_lib.arrays([one() for _ in range(args.tasks)])


def sentences(args: argparse.Namespace, rng: np.random.Generator) -> rows_lib.Rows:
    """Sentences of tasks with different mean lengths, several in a row of tokens."""
    lengths = [np.clip(rng.poisson(mean, 400), 3, TOKENS) for mean in np.linspace(10, 34, args.tasks)]
    ids = rng.integers(1000, 30000, (400, TOKENS)).astype(np.int32)
    take = lambda t, n: {"ids": ids[n], "mask": np.arange(TOKENS) < lengths[t][n][:, None]}
    return rows_lib.Rows((400,) * args.tasks, take, packing.joiner(lengths, TOKENS))


def _noise(tasks: int, dtype: str, path: str, x: jax.ShapeDtypeStruct) -> jax.Array:
    """Task vectors of one leaf, of deviation 1e-3."""
    axis = int(trees.is_stacked(path))
    key = jax.random.fold_in(jax.random.key(1), zlib.crc32(path.encode()))
    return 1e-3 * jax.random.normal(key, (*x.shape[:axis], tasks, *x.shape[axis:]), dtype)


def _peer(found: dict[str, Any]) -> dict[str, Any]:
    """What FusionBench's script prints, in our terms."""
    if "step_wall" not in found:
        return {"error": "no result", **found}
    steps = found["step_wall"]
    extra = found["peak_rss_mb"] - found["rss_before_mb"]
    # Its merged model holds the copies it was given: what it was before the run is part of what it needs.
    return {
        "first": steps[0],
        "total": sum(steps),
        "step": statistics.median(steps[1:] or steps),
        "extra_mb": extra,
        "peak_mb": found["peak_rss_mb"],
    }


def table(found: dict[str, list[dict[str, Any]]]) -> rich.table.Table:
    """Medians over processes."""
    out = rich.table.Table("", *(names := ("step", "first", "total", "plain", "extra_mb", "held_mb", "peak_mb")))
    for side, runs in found.items():
        cells = [[run[name] for run in runs if name in run] for name in names]
        out.add_row(side, *(f"{statistics.median(values):.4g}" if values else "" for values in cells))
    return out


def surgery_run() -> dict[str, Any]:
    """Surgery's 1,000 steps over 8 tasks, features cached."""
    rng = np.random.default_rng(0)
    merged, expert = ([rng.standard_normal((1000, 512)).astype(np.float32) for _ in range(8)] for _ in range(2))
    start = time.perf_counter()
    jax.block_until_ready(surgery.train(merged, expert))
    return {"first": time.perf_counter() - start, "device": jax.devices()[0].device_kind}


if __name__ == "__main__":
    main()
