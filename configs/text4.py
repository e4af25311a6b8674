"""Four text tasks on the MiniLM-L6 sentence encoder, all from PyPI packages.

    python -m experiments.benchmark --config=configs/text4.py --workdir=results/text4

Tasks: film reviews (fresh or rotten), plot or review sentence, party of a debate speaker, WordNet gloss to one of 14
supersenses. Fixed heads from the pretrained features. Besides the rows of every benchmark there are merges with
statistics of held-out rows (`experiments.collected`) and merges that store one model per task.
"""

from configs import common


def get_config(arg=None):
    """Arguments: ``runlocal`` (a run of seconds, for tests), ``seeds`` (how many)."""
    arg = common.parse_arg(arg, runlocal=False, seeds=3)
    config = common.benchmark("text4", arg.seeds)
    config.model = "minilm"
    tasks = ("review_sentiment", "plot_or_review", "debate_party", "wordnet_supersense")
    config.suite = common.suite("text", tasks, train=512, held_out=128, test=500, max_length=48)
    config.finetune.learning_rate = 1e-4
    config.finetune.steps = 32
    more = {label: {} for label in ("regmean", "regmean_plusplus", "tall_masks", "emr", "tsv_compress")}
    config.settings.update(more)
    at = config.methods.index("tsv_m") + 1
    config.methods = (*config.methods[:at], *more, *config.methods[at:])
    return common.shrink(config) if arg.runlocal else config
