"""Fine-tunes one expert a task and writes each as a model folder that `taskvec.models.load` takes.

    python -m experiments.finetune --config=configs/text4.py --workdir=results/experts

The experts are those of `experiments.benchmark` with the same config, and come from the cache if they are there.
"""

import pathlib

from absl import app

from experiments import setup
from experiments.prepare import load_base, prepare
from taskvec import models
from taskvec.io.progress import say


def main(argv):
    """Fine-tunes the experts of a config."""
    finetune(*setup.start(argv))


def finetune(config, workdir: pathlib.Path) -> None:
    """Writes ``seedS/TASK`` for every seed and task, and ``pretrained`` beside them."""
    base = load_base(config)
    source = base.folder if base.folder.is_dir() else None
    models.save(workdir / "pretrained", base.model, base.pretrained, source=source)
    for seed in config.seeds:
        bench = prepare(config, base, seed)
        for task, params in zip(bench.tasks, bench.experts, strict=True):
            folder = workdir / f"seed{seed}" / task.name
            models.save(folder, base.model, params, source=source)
            say(f"wrote {folder}")


if __name__ == "__main__":
    app.run(main)
