"""All adaptive methods in one table, on a suite that a CPU can do: short runs with larger steps than published.

    python -m experiments.benchmark --config=configs/learned.py:suite=clip_small,source=DATA --workdir=results/learned
    python -m experiments.benchmark --config=configs/learned.py:suite=text8,source=DATA,seeds=1

The suites are those of `configs/clip_small.py` and `configs/text8.py`. Rows with ``_inductive`` adapt to held-out
training rows without labels, others that need no labels to the test rows. Methods with labels have the held-out rows.
``atlas_few_shot``, ``atlas_ufm`` and ``lorahub`` learn each task from the other tasks' vectors. The published settings
are in `configs/adaptive`; nothing here is tuned. Steps and epochs are fewer, for time. Rates of most rows are such that
Adam can move a coefficient by 0.5 in any number of ``steps``, as in AdaMerging's 500 of 1e-3; methods published with
longer ways (AdaRank, Concrete's second stage) have shorter ones here.
"""

from configs import adaptive, clip_small, common, text8

SUITES = {"clip_small": clip_small, "text8": text8}
# Rows of a task: in a step; that Frank-Wolfe takes gradients of; that Sens-Merging does (None: all held-out ones).
SIZES = {"clip_small": (16, 100, None), "text8": (8, 32, 32)}


def get_config(arg=None):
    """Arguments: ``suite`` (clip_small, text8), its ``source`` folder, ``seeds``, ``steps`` (from 20), ``runlocal``."""
    arg = common.parse_arg(arg, suite="clip_small", source="data", seeds=3, steps=100, runlocal=False)
    if arg.suite not in SUITES:
        raise ValueError(f"suite={arg.suite!r}; allowed: {', '.join(SUITES)}")
    if arg.steps < 20:
        raise ValueError(f"steps={arg.steps}: 20 at least, with which the shortest row has one epoch")
    config = SUITES[arg.suite].get_config(f"source={arg.source},seeds={arg.seeds},runlocal={arg.runlocal}")
    config = adaptive.table(config, f"learned_{arg.suite}", rows(arg.steps, *SIZES[arg.suite]))
    config.claims = (("weight_average", "tsv_m"), ("tsv_m", "adamerging"), ("adamerging", "symerge"))
    return common.shrink(config) if arg.runlocal else config


def rows(steps: int, per_task: int, shots: int, calibration: int | None) -> adaptive.Rows:
    """The rows of the table."""
    run = {"steps": steps, "per_task": per_task, "learning_rate": 0.5 / steps}
    mask = {**run, "learning_rate": 2 / steps}
    turns = {"rounds": steps // 4, "per_task": per_task, "learning_rate": 1 / steps, "head_learning_rate": 1e-2}
    turned = {"rounds": 3, "shots": shots, **run, "steps": steps // 3}
    epochs = {"epochs": steps // 10, "keep": "last"}
    test, train = {"data": "unlabelled test"}, {"data": "unlabelled train"}
    correction = {"on": "tsv_m", "rank": 16, "steps": 1000, "learning_rate": 1e-3}
    both = adaptive.transductive_and_not
    return {
        "task_arithmetic": {"scale": (0.3, 0.5, 0.7, 1.0)},
        "tsv_m": {},
        **both("adamerging", **run),
        "adamerging_taskwise": {"method": "adamerging", "mode": "task", **run, **test},
        "adamerging_pp": {"method": "adamerging", "plus_plus": True, **run, **test},
        **both("concrete_task_arithmetic", **mask),
        "concrete_adamerging": {
            **{**mask, **test},
            "coefficient_steps": steps // 2,
            "coefficient_learning_rate": 0.1 / steps,
        },
        **both("adarank", **run),
        "adarank_cart": {"method": "adarank", "base": "average", **run, **test},
        **both("symerge", **turns),
        **both("samerging", **run),
        **both("divmerge", **run),
        "prodistill": {"shots": 64, "epochs": steps // 5, "learning_rate": 1 / steps, **train},
        "self_positioning": {"steps": steps // 2, "per_set": per_task, "data": "few labelled"},
        "atlas": {**epochs, "per_task": per_task, "learning_rate": 1 / steps},
        "supermerge": {**run},
        "fw_hard": {"shots": shots},
        "fw_soft": {**turned, "adapt": "unlabelled test"},
        "fw_soft_inductive": {"method": "fw_soft", **turned, "adapt": "unlabelled train"},
        "sens_merging": {"shots": calibration},
        "atlas_few_shot": {**epochs, "batch_size": 32, "learning_rate": 5 / steps},
        "atlas_ufm": {"epochs": steps // 20, "batch_size": 32, "learning_rate": 0.5 / steps, **test},
        "lorahub": {"budget": 40, "factors": False},
        **both("surgery", **correction),
        "surgery_centred": {"method": "surgery", **correction, "center": True, **test},
        "surgery_v2": {"steps": steps, "per_task": per_task, "on": "tsv_m", "learning_rate": 5e-3, **train},
    }
