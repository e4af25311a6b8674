"""Two decoders fine-tuned from one (Llama, Mistral, Qwen2), merged, each scored by the answers that it writes.

    python -m experiments.benchmark --config=configs/llama_pair.py:model=BASE,experts=ONE+TWO,tasks=one+two,source=DATA

Models are folders or hub ids; the first expert is that of the first task. DATA holds ``text_TASK.jsonl``: ``split``
(train, test; train is not looked at, but must not be empty), ``text`` (the whole prompt, with its examples if any) and
``label`` (the answer, a string). A row is right if the first line that the model writes after the prompt, greedily,
equals the label. Weights are in single precision: three models and the merge are 16 bytes per parameter. Vocabularies
must agree; ``taskvec merge`` brings those of different sizes together.

Published, other protocols (GSM8K by the last number of a solution that the model writes at length, and the like), so
not to be met here. MergeLM, Llama-2-13b: WizardLM merged with WizardMath has GSM8K 66.3, WizardLM alone 2.2. The same
two and Code Alpaca, mean of scores divided by the experts' (WUDI-Merging's page): task_arithmetic 80.4, ties 82.6, the
two on DARE's models 84.0 and 87.2, wudi 91.5.
"""

from configs import common

PAIR = "WizardLMTeam/WizardLM-13B-V1.2+WizardLMTeam/WizardMath-13B-V1.0"


def get_config(arg=None):
    """Arguments: see above; ``length`` (tokens of a prompt, the last are kept), ``answer`` (tokens of an answer)."""
    arg = common.parse_arg(
        arg, model="meta-llama/Llama-2-13b-hf", experts=PAIR, tasks="instruct+math", source="data", length=512,
        answer=16, runlocal=False,
    )  # fmt: skip
    experts, tasks = arg.experts.split("+"), tuple(arg.tasks.split("+"))
    if len(experts) != 2 or len(tasks) != 2:
        raise ValueError(f"experts={arg.experts}, tasks={arg.tasks}; want two each, joined by +")
    config = common.benchmark("llama_pair", seeds=1)
    config.model, config.heads, config.max_new_tokens = arg.model, "answers", arg.answer
    config.checkpoints = dict(zip(tasks, experts, strict=True))
    rows = {"train": None, "held_out": 0, "test": None}
    config.suite = common.suite("text", tasks, source=arg.source, max_length=arg.length, **rows)
    config.settings.task_arithmetic = {"scale": 1.0}
    config.settings.ties = {"scale": 1.0}
    config.settings.dare_ties = {"density": 0.8, "scale": 1.0}  # MergeLM's example drops 0.2
    config.methods = ("pretrained", "weight_average", "task_arithmetic", "ties", "dare_ties", "tsv_m", "individual")
    config.claims = (("weight_average", "best static"), ("best static", "individual"))
    if arg.runlocal:
        common.shrink(config)
        config.suite.max_length = arg.length
    return config
