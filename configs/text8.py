"""Eight text tasks on MiniLM-L6 from a folder of ``text_NAME.jsonl`` files (split, text, label a line).

    python -m experiments.benchmark --config=configs/text8.py:source=DATA --workdir=results/text8

Measured, accuracy (%), one seed (0), 292 to 400 test rows per task, two shared CPU cores:

| method | subj | mr | trec | mpqa | agnews | banking77 | snips | tweet_offensive | mean |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| pretrained | 89.0 | 68.5 | 78.5 | 79.8 | 86.0 | 83.0 | 92.0 | 68.8 | 80.7 |
| weight_average | 89.7 | 73.5 | 83.5 | 81.5 | 84.5 | 82.5 | 93.8 | 72.0 | 82.6 |
| breadcrumbs | 91.1 | 74.8 | 90.5 | 81.5 | 82.5 | 81.8 | 95.2 | 76.2 | 84.2 |
| lines | 92.1 | 74.5 | 88.8 | 84.5 | 81.5 | 81.8 | 94.5 | 76.2 | 84.2 |
| ties | 91.4 | 75.8 | 90.5 | 81.5 | 83.2 | 81.8 | 95.0 | 76.0 | 84.4 |
| consensus_ta | 91.1 | 75.5 | 90.5 | 82.5 | 82.5 | 81.5 | 95.2 | 76.5 | 84.4 |
| dare_ties | 91.1 | 75.8 | 90.8 | 82.2 | 83.0 | 81.5 | 95.5 | 76.2 | 84.5 |
| task_arithmetic | 92.5 | 74.5 | 91.0 | 82.2 | 81.2 | 81.8 | 95.5 | 78.8 | 84.7 |
| adamerging_inductive | 91.4 | 73.5 | 90.8 | 83.2 | 84.0 | 81.5 | 95.8 | 77.5 | 84.7 |
| adamerging | 92.1 | 74.2 | 91.0 | 83.5 | 83.0 | 81.2 | 95.8 | 77.2 | 84.8 |
| tsv_m | 92.1 | 75.5 | 91.5 | 84.8 | 84.0 | 83.5 | 95.0 | 78.2 | 85.6 |
| surgery_inductive | 92.1 | 72.2 | 93.8 | 86.8 | 84.5 | 83.5 | 95.5 | 77.8 | 85.8 |
| joint | 91.1 | 74.8 | 93.2 | 85.8 | 86.0 | 83.8 | 95.5 | 78.0 | 86.0 |
| individual | 92.1 | 75.8 | 95.0 | 87.2 | 86.2 | 84.5 | 96.0 | 79.0 | 87.0 |
| surgery | 92.5 | 75.5 | 95.2 | 87.8 | 87.0 | 84.0 | 96.2 | 79.5 | 87.2 |

Paired differences of means, with their standard error over test rows: the average is above the pretrained model by 1.9
(0.35), the best static merge above the average by 3.0 (0.44), Surgery on the test rows above that by 1.6 (0.42) and not
below the experts (-0.2, 0.21). No order is claimed of rows half a point apart: the known one, AdaMerging above task
arithmetic, is not to be seen. A single seed says nothing of the choice of training rows.
"""

from configs import common

TASKS = ("subj", "mr", "trec", "mpqa", "agnews", "banking77", "snips", "tweet_offensive")


def get_config(arg=None):
    """Arguments: ``source`` (the folder), ``runlocal`` (a run of seconds, for tests), ``seeds`` (how many)."""
    arg = common.parse_arg(arg, source="data", runlocal=False, seeds=3)
    config = common.benchmark("text8", arg.seeds)
    config.model = "minilm"
    config.suite = common.suite("text", TASKS, source=arg.source, train=800, held_out=128, test=400, max_length=32)
    config.finetune.learning_rate = 5e-5
    config.finetune.steps = 50
    for label in ("adamerging", "adamerging_inductive"):  # a fifth of the steps at five times the rate, for time
        config.settings[label].update(steps=100, learning_rate=5e-3)
    config.settings.surgery.on = config.settings.surgery_inductive.on = "tsv_m"
    # Its other forms are rows of `configs/learned.py`.
    config.methods = tuple(x for x in (*config.methods, "joint") if x not in ("adamerging_taskwise", "adamerging_pp"))
    return common.shrink(config) if arg.runlocal else config
