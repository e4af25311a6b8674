"""Runs ours and the peers in processes of their own, and watches their time and memory.

FusionBench is driven by a folder of scripts (``b_merge.py NAME`` prints ``RESULT`` and JSON); MergeKit by its Python
interface, with the same recipe file that ours reads. Memory is read from Linux's ``/proc`` every 20 ms, for the
process and its children: the anonymous part (what it allocated) and the whole resident set, in which pages of mapped
files count too. The resident peak also takes the kernel's high-water mark, which misses nothing; ``ru_maxrss`` is not
used, since a child inherits its parent's.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
EVERY = 0.02  # seconds between two looks at the memory

# MergeKit as its own command line runs it, less the tokenizer, which these models lack.
_MERGEKIT = """
import sys, time
start = time.perf_counter()
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
imported = time.perf_counter()
with open(sys.argv[1], encoding="utf-8") as file:
    config = MergeConfiguration.model_validate(yaml.safe_load(file))
run_merge(config, sys.argv[2], MergeOptions(quiet=True, random_seed=0, copy_tokenizer=False))
print('RESULT {"import_seconds": %f, "merge_seconds": %f}' % (imported - start, time.perf_counter() - imported))
"""


def watch(command: Sequence[Any], env: Mapping[str, str] | None = None, limit: float = 3600) -> dict[str, Any]:
    """Runs a command to its end.

    Args:
      command: program and arguments.
      env: added to this process's environment.
      limit: seconds after which the command is ended.

    Returns:
      ``seconds``, ``cpu_seconds``, ``anonymous_mb`` and ``resident_mb`` at their peaks, and what the command printed
      after ``RESULT``; or ``error`` with its last words.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        start, peak = time.perf_counter(), {"anonymous_mb": 0.0, "resident_mb": 0.0}
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        ended = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, peak, ended, start + limit))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)  # it has been waited for
        ended.set()
        watcher.join()
        out.seek(0)
        err.seek(0)
        printed, complaints = out.read(), err.read()
    if process.returncode:
        late = f"ended after {limit:.0f} s" if seconds >= limit else _last_words(complaints, printed)
        return {"error": late, "seconds": seconds}
    results = [line for line in printed.splitlines() if line.startswith("RESULT ")]
    found = json.loads(results[-1].removeprefix("RESULT ")) if results else {}
    figures = {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    return {**figures, **{name: round(mb) for name, mb in peak.items()}, **found}


def _watch(pid: int, peak: dict[str, float], ended: threading.Event, deadline: float) -> None:
    while not ended.wait(EVERY):
        anonymous = resident = 0.0
        for each in _family(pid):
            fields = _status(each)
            anonymous += fields.get("RssAnon", 0)
            resident += fields.get("VmRSS", 0)
            peak["resident_mb"] = max(peak["resident_mb"], fields.get("VmHWM", 0))
        peak["anonymous_mb"] = max(peak["anonymous_mb"], anonymous)
        peak["resident_mb"] = max(peak["resident_mb"], resident)
        if time.perf_counter() > deadline:
            os.killpg(pid, signal.SIGKILL)
            return


def _family(pid: int) -> list[int]:
    """A process and its children, where the kernel lists them."""
    try:
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *(each for child in children for each in _family(int(child)))]


def _status(pid: int) -> dict[str, float]:
    """Memory fields of a process in megabytes; empty once it has ended."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) / 1024 for name, value in pairs}


def _last_words(*texts: str) -> str:
    """The last line of each text that has one."""
    lines = [[line.strip() for line in text.splitlines() if line.strip()] for text in texts]
    return "; ".join(each[-1][-300:] for each in lines if each) or "no output"


def own(module: str, *arguments: Any, must: bool = True) -> dict[str, Any]:
    """Runs ``python -m benchmarks.MODULE`` beside this process, which stays small; raises on errors if it `must`."""
    found = watch([sys.executable, "-m", f"benchmarks.{module}", *arguments], {"JAX_PLATFORMS": "cpu"})
    if must and "error" in found:
        raise RuntimeError(f"{module} {' '.join(map(str, arguments[:3]))} failed: {found['error']}")
    return found


def ours_in_memory(folder: pathlib.Path, method: str, settings: dict, tasks: int, limit: float) -> dict[str, Any]:
    """One method of ours on the vision towers."""
    command = [sys.executable, "-m", "benchmarks.tower", folder, method, "--settings", json.dumps(settings)]
    return watch([*command, "--tasks", tasks], {"JAX_PLATFORMS": "cpu"}, limit)


def ours_on_disk(recipe: pathlib.Path, out: pathlib.Path, cache: pathlib.Path, options: str, limit: float) -> dict:
    """Our command line on a recipe, with more `options`; `cache` is where compiled programs may be kept."""
    command = [sys.executable, "-m", "taskvec", "merge", recipe, "--out", out, *options.split()]
    return watch(command, {"TASKVEC_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}, limit)


class Peers:
    """Where the peers are: their Pythons (``None`` if absent), the folder of scripts, and the work folder."""

    def __init__(self, fusionbench: str | None, mergekit: str | None, scripts: pathlib.Path | None, work: pathlib.Path):
        if fusionbench and scripts is None:
            raise ValueError("--fusionbench needs --peers, the folder with fbcommon.py and b_merge.py")
        self.fusionbench, self.mergekit, self.scripts = fusionbench, mergekit, scripts
        self.env = {"PEERS_DIR": str(work), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    def make(self, kind: str) -> bool:
        """Lets a peer's script make the checkpoints, which then are those that its listed norms belong to."""
        tower = kind == "tower"
        python, script = (self.fusionbench, ["fbcommon.py", "make"]) if tower else (self.mergekit, ["mk_models.py"])
        if python is None or self.scripts is None:
            return False
        result = watch([python, self.scripts / script[0], *script[1:]], self.env)
        if "error" in result:
            raise RuntimeError(f"{script[0]} failed: {result['error']}")
        return True

    def in_memory(self, name: str, tasks: int, limit: float) -> dict[str, Any]:
        """FusionBench's merge `name` on the vision towers."""
        name, *assignments = name.split()  # "wudi WUDI_IT=10"
        env = {**self.env, "T": str(tasks), **dict(each.split("=") for each in assignments)}
        result = watch([self.fusionbench, self.scripts / "b_merge.py", name], env, limit)
        if "wall_s" not in result:
            return {"error": "no result", **result}
        norms = result.get("digest", result.get("out", "none"))
        return {
            "seconds": result["wall_s"],
            "cpu_seconds": result["cpu_s"],
            "models_mb": result["rss_before_mb"],
            "extra_mb": result["peak_rss_mb"] - result["rss_before_mb"],
            "norms": norms if isinstance(norms, list) else [norms],
        }

    def on_disk(self, recipe: pathlib.Path, out: pathlib.Path, limit: float) -> dict[str, Any]:
        """MergeKit on a recipe, imports included."""
        return watch([self.mergekit, "-c", _MERGEKIT, recipe, out], self.env, limit)

    def versions(self) -> dict[str, str]:
        """Versions of what was installed for the peers."""
        ask = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
        found = {}
        for python, names in (
            (self.fusionbench, ("fusion-bench", "torch", "transformers")),
            (self.mergekit, ("mergekit", "torch", "transformers")),
        ):
            if python:
                run = subprocess.run([python, "-c", ask, *names], capture_output=True, text=True, check=True)
                found[names[0]] = ", ".join(f"{name} {v}" for name, v in json.loads(run.stdout).items())
        return found
