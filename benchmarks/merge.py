"""Speed and memory of merges: ours, FusionBench and MergeKit in one run, beside what the machine allows.

    python -m benchmarks.merge --work bench_work                            # ours and the floors alone
    python -m benchmarks.merge --work bench_work --peers SCRIPTS \\
        --fusionbench FB_ENV/bin/python --mergekit MK_ENV/bin/python

Part ``memory``: 8 fine-tuned copies of a CLIP-ViT-B/32-sized vision tower, already in memory, a fresh process for every
run; seconds of the merge alone, of ours the first call (with compilation) and the second; peak memory above the
models. Part ``disk``: 4 Llama-shaped folders of 134 M parameters to a folder, from the start of the process to its
end; ours also with an empty cache of compiled programs (``cold``); peak memory of the whole process. Runs of the two
sides alternate. Leaves ``OUT.json`` and ``OUT.md``, rewritten after every row. About 6 GB of checkpoints go to the work
folder. Linux only (memory is read from ``/proc``); wants a quiet machine.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import statistics
import sys
from collections.abc import Callable
from typing import Any

import yaml

# No jax here or below: one of the peers needs nearly all memory, so the process that waits for it stays small.
from benchmarks import peers as peers_lib, rows as rows_lib, table as table_lib
from benchmarks.rows import DISK, MEMORY, Row

TASKS = 8  # fine-tuned towers of part (a)
DTYPES = {"f32": "float32", "bf16": "bfloat16"}


def main(argv: list[str] | None = None) -> None:
    """Runs the rows asked for and writes the tables."""
    args = arguments(argv)
    rows = rows_lib.chosen(args.part, args.only)
    work = args.work.absolute() / ("small" if args.small else "")
    peers = peers_lib.Peers(args.fusionbench, args.mergekit, args.peers, work)
    earlier = json.loads(args.peers_from.read_text(encoding="utf-8")) if args.peers_from else {"rows": []}
    options = {"small": args.small, "dtype": args.dtype, "repeats": args.repeats, "ours": args.ours_options}
    found = {"machine": machine(), "versions": versions() | peers.versions(), "options": options, "rows": []}
    if found["machine"]["load"] > 0.5:
        say(f"the machine is not quiet (load {found['machine']['load']:.1f}): figures will be too high on both sides")
    made_here = {part: ready(part, args, work, peers) for part in dict.fromkeys(row.part for row in rows)}
    found["checkpoints made here"] = made_here
    floors = floors_in_memory(rows, args.small)
    found["rates"] = floors["rates"]
    for row in rows:
        result = on_disk(row, args, work, peers) if row.part == DISK else in_memory(row, args, work, peers)
        result.setdefault("floor", floors["floors"].get(row.name))
        if not result["peer"]:
            result["peer"] = reused(row, earlier, options, args.peers_from)
        if row.known and not made_here[row.part]:
            result["known norm"] = row.known
        found["rows"].append({"part": row.part, "name": row.name, "goal": row.goal, "note": row.note, **result})
        say(table_lib.line(found["rows"][-1]))
        write_text(args.out.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
        write_text(args.out.with_suffix(".md"), table_lib.markdown(found))
    print(table_lib.markdown(found))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    path = pathlib.Path
    parser.add_argument("--work", type=path, required=True, help="folder for checkpoints and outputs")
    parser.add_argument("--out", type=path, default=path("results/merge"), help="OUT.json and OUT.md")
    parser.add_argument("--part", choices=(MEMORY, DISK), help="both unless given")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="rows, e.g. ties,model_stock")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--long", type=float, default=150, help="a run of more seconds is not repeated")
    parser.add_argument("--limit", type=float, default=600, help="a run of more seconds is ended")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="of the Llama-shaped folders")
    parser.add_argument("--small", action="store_true", help="tiny models: tests the benchmark, says nothing of speed")
    parser.add_argument("--ours-options", default="", help="more options of `taskvec merge`: --ours-options='--a --b'")
    parser.add_argument("--fusionbench", metavar="PYTHON", help="Python of an environment with fusion-bench")
    parser.add_argument("--mergekit", metavar="PYTHON", help="Python of an environment with mergekit")
    parser.add_argument("--peers", type=path, metavar="FOLDER", help="scripts: fbcommon.py, b_merge.py, mk_models.py")
    parser.add_argument("--peers-from", type=path, metavar="FILE.json", help="peers' figures of an earlier run")
    args = parser.parse_args(argv)
    if args.small and args.fusionbench:
        parser.error("--small: the scripts for FusionBench know the full-sized tower only; leave --fusionbench out")
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    return args


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 2),
        "date": datetime.date.today().isoformat(),
    }


def versions() -> dict[str, str]:
    """Versions of what ours runs on."""
    own = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "numpy"))
    return {"ours": f"Python {platform.python_version()}, {own}"}


def ready(part: str, args: argparse.Namespace, work: pathlib.Path, peers: peers_lib.Peers) -> bool:
    """Makes the checkpoints of a part if they are absent; returns whether they were made here, not by a peer."""
    folder = work / "ckpt" if part == MEMORY else work / "models" / args.dtype
    marker = folder / "made_by_numpy"
    if not ((folder / "base.safetensors").exists() or (folder / "base" / "config.json").exists()):
        say(f"making checkpoints in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        if args.small or not peers.make("tower" if part == MEMORY else "llama"):
            marker.touch()
            small = ["--small"] if args.small else []
            if part == MEMORY:
                peers_lib.own("models", "tower", work, "--tasks", TASKS, *small)
            else:
                peers_lib.own("models", "llama", work, "--dtype", args.dtype, *small)
    return marker.exists()


def reused(row: Row, earlier: dict, options: dict, path: pathlib.Path | None) -> dict[str, Any]:
    """The peer's figures of an earlier run of the same sizes, marked as such; empty if there are none."""
    same = ("small", "dtype") if row.part == DISK else ("small",)
    if not path or any(earlier["options"][name] != options[name] for name in same):
        return {}
    peer = next((r["peer"] for r in earlier["rows"] if (r["part"], r["name"]) == (row.part, row.name)), {})
    return {"from": path.name, "on": earlier["machine"], **peer} if peer else {}


def alternate(sides: dict[str, Callable | None], args: argparse.Namespace) -> dict[str, dict]:
    """Runs the sides in turn, `repeats` times; a side that fails or takes long is not run again."""
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, call in sides.items():
            done = runs[name]
            if call and not (done and ("error" in done[-1] or done[-1]["seconds"] > args.long)):
                done.append(call())
    return {name: summary(done) for name, done in runs.items()}


def summary(runs: list[dict]) -> dict[str, Any]:
    """Medians of all figures of a side, the least seconds, and the runs themselves."""
    errors = [run["error"] for run in runs if "error" in run]
    if errors or not runs:
        return {"error": errors[0], "runs": runs} if errors else {}
    medians = {k: statistics.median(run[k] for run in runs) for k, v in runs[0].items() if isinstance(v, int | float)}
    others = {k: v for k, v in runs[0].items() if not isinstance(v, int | float)}
    return {**medians, "least_seconds": min(run["seconds"] for run in runs), **others, "runs": runs}


def floors_in_memory(rows: list[Row], small: bool) -> dict[str, dict]:
    """Rates of this machine and floors of the rows of part (a)."""
    asked = [(row.name, row.method, row.settings) for row in rows if row.part == MEMORY]
    if not asked:
        return {"rates": {}, "floors": {}}
    more = ["--tasks", TASKS, *(["--small"] if small else [])]
    return peers_lib.own("floors", "memory", json.dumps(asked), *more)


def in_memory(row: Row, args: argparse.Namespace, work: pathlib.Path, peers: peers_lib.Peers) -> dict[str, Any]:
    """A row of part (a)."""
    with_peer = peers.fusionbench and row.peer
    sides = {
        "peer": (lambda: peers.in_memory(row.peer, TASKS, args.limit)) if with_peer else None,
        "ours": lambda: peers_lib.ours_in_memory(work / "ckpt", row.method, row.settings, TASKS, args.limit),
    }
    return {"settings": row.settings, **alternate(sides, args)}


def on_disk(row: Row, args: argparse.Namespace, work: pathlib.Path, peers: peers_lib.Peers) -> dict[str, Any]:
    """A row of part (b)."""
    models, outs = work / "models" / args.dtype, {name: work / "out" / name for name in ("ours", "peer")}
    content = rows_lib.recipe(row, models, DTYPES[args.dtype])
    path = work / "recipes" / f"{row.method}.{args.dtype}.yml"
    write_text(path, yaml.safe_dump(content, sort_keys=False))
    files = [file for folder in rows_lib.inputs(row, models) for file in folder.glob("*.safetensors")]
    out_bytes = sum(file.stat().st_size for file in (models / "ft0").glob("*.safetensors"))
    floor = peers_lib.own("floors", "disk", out_bytes, work / "floor.tmp", *files)  # warms the page cache, too
    cache = work / "cache"

    def run(name: str) -> dict:
        shutil.rmtree(outs[name], ignore_errors=True)
        if name == "peer":
            return peers.on_disk(path, outs[name], args.limit)
        return peers_lib.ours_on_disk(path, outs[name], cache, args.ours_options, args.limit)

    shutil.rmtree(cache, ignore_errors=True)
    cold = run("ours")
    sides = {
        "peer": (lambda: run("peer")) if peers.mergekit else None,
        "ours": (lambda: run("ours")) if "error" not in cold else (lambda: cold),
    }
    result = {"settings": content, **alternate(sides, args), "cold": cold, "floor": floor}
    there = [name for name in outs if result[name] and "error" not in result[name]]
    if there:
        result["compared"] = peers_lib.own("models", "compare", *(outs[name] for name in there), must=False)
        result["largest difference"] = result["compared"].get("largest_difference")
        for name, norm in zip(there, result["compared"].get("norms", []), strict=False):
            result[name]["norms"] = [norm]
    shutil.rmtree(work / "out", ignore_errors=True)
    return result


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it, so that it is never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
