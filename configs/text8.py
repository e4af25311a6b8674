"""Eight text tasks on MiniLM-L6 from a folder of ``text_NAME.jsonl`` files (split, text, label a line).

python -m experiments.benchmark --config=configs/text8.py:source=DATA --workdir=results/text8
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
    return common.shrink(config) if arg.runlocal else config
