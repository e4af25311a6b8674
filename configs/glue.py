"""Published GLUE checkpoints, merged: Flan-T5 that writes its answers, RoBERTa and GPT-2 under their experts' heads.

    python -m experiments.benchmark --config=configs/glue.py:model=flan_t5_base
    python -m experiments.benchmark --config=configs/glue.py:model=gpt2,checkpoints=FOLDER,source=DATA

Models: ``flan_t5_base``, ``flan_t5_base_lora``, ``flan_t5_large`` (LoRA), ``roberta_base``, ``gpt2``. With network the
checkpoints come from the hub (google/flan-t5-..., tanganke/flan-t5-..._glue-TASK, tanganke/gpt2_TASK); without, from
FOLDER, which holds them under the last part of those names. RoBERTa's experts are the folders of one hub repository,
vanillaOVO/roberta_base_glue_ckpts (of arXiv 2311.03099), and start from FacebookAI/roberta-base; FOLDER holds them as
``TASK/roberta-base_lr1e-05`` beside ``roberta-base``. DATA as in `taskvec.data.glue`, or ``hub``. Rows are the
validation split; Flan-T5's answers are right if they equal the target letter for letter, STS-B is scored by Spearman's
rho.

Published, per cent, protocol fusion_bench (docs/modelpool/flan-t5_generation.md and gpt2_classification.md), TIES as
there, which sums what agrees. Flan-T5, mean of 8 tasks, task arithmetic and TIES with scale 0.3:

| method | base | base, LoRA 16 | large, LoRA 16 |
| --- | ---: | ---: | ---: |
| pretrained | 75.7 | 75.7 | 82.1 |
| weight_average | 78.9 | 78.2 | 86.5 |
| task_arithmetic | 78.9 | 77.4 | 87.3 |
| ties | 79.9 | 77.5 | 87.4 |
| individual | 86.4 | 84.6 | 89.6 |

base by task (CoLA, MNLI, MRPC, QNLI, QQP, RTE, SST-2, STS-B): pretrained 69.1, 56.5, 76.2, 88.4, 82.1, 80.1, 91.2,
62.2; experts 75.0, 83.4, 87.5, 91.5, 85.4, 85.9, 93.6, 88.7. With the LoRA experts and a scale of 0.5 MNLI falls to
2.2: the model no longer writes one of the answers.

GPT-2, mean of 7 tasks (no STS-B): weight_average 56.1, Fisher 58.7, RegMean 68.8, task_arithmetic (0.5) 70.0, ties
(0.6) 70.0, individual 82.0; the two scales were chosen on the rows that are scored.

RoBERTa-base, mean of 8 tasks, another protocol (GLUE's own metrics, divided by the experts'; WUDI-Merging's page):
weight_average 52.6, task_arithmetic 67.8, ties 64.7. Not divided, SyMerge's page has experts 85.6, task_arithmetic
66.7, tsv_m 68.2, Surgery on task_arithmetic 80.5. Here CoLA is scored by accuracy and STS-B by Spearman's rho, so
neither is to be met to the point.
"""

from configs import common
from taskvec.data import glue

# Pretrained model, expert of a task, the longest text in tokens, scales of task_arithmetic and ties.
MODELS = {
    "flan_t5_base": ("google/flan-t5-base", "tanganke/flan-t5-base_glue-{}", 512, (0.3, 0.3)),
    "flan_t5_base_lora": ("google/flan-t5-base", "tanganke/flan-t5-base_glue-{}_lora-16", 512, (0.3, 0.3)),
    "flan_t5_large": ("google/flan-t5-large", "tanganke/flan-t5-large_glue-{}_lora-16", 512, (0.3, 0.3)),
    "roberta_base": (
        "FacebookAI/roberta-base",
        "vanillaOVO/roberta_base_glue_ckpts/{}/roberta-base_lr1e-05",
        128,
        (0.3, 0.3),
    ),
    "gpt2": ("openai-community/gpt2", "tanganke/gpt2_{}", 128, (0.5, 0.6)),
}


def get_config(arg=None):
    """Arguments: see above; ``tasks`` (joined by +), ``length`` (tokens; 0 for the model's usual)."""
    arg = common.parse_arg(
        arg, model="flan_t5_base", checkpoints="hub", source="hub", tasks="", length=0, runlocal=False
    )
    if arg.model not in MODELS:
        raise ValueError(f"model={arg.model!r}; allowed: {', '.join(MODELS)}")
    base, expert, length, scales = MODELS[arg.model]
    config = common.benchmark(f"glue_{arg.model}", seeds=1)
    config.model = _place(base, arg.checkpoints)
    writes = arg.model.startswith("flan_t5")
    config.heads = "answers" if writes else "trained"
    config.max_new_tokens = 9  # FusionBench's ten, of which the first is the start
    tasks = tuple(arg.tasks.split("+")) if arg.tasks else tuple(glue.TASKS)
    if arg.model == "gpt2" and not arg.tasks:
        tasks = tuple(name for name in tasks if name != "stsb")
    config.checkpoints = {task: _place(expert.format(task), arg.checkpoints) for task in tasks}
    family = "glue_text_to_text" if writes else "glue"
    # Nothing is trained or searched: training rows are read because a task has them.
    rows = {"train": 64, "held_out": 0, "test": None}
    config.suite = common.suite("text", tasks, source=arg.source, family=family, max_length=length, **rows)
    config.settings.task_arithmetic = {"scale": scales[0]}
    config.settings.ties = {"scale": scales[1], **common.FUSION_BENCH_TIES}
    config.settings.surgery.update({"on": "task_arithmetic", "center": False})
    config.methods = ("pretrained", "weight_average", "task_arithmetic", "ties", "tsv_m", "individual")
    config.claims = (("pretrained", "weight_average"), ("weight_average", "best static"), ("best static", "individual"))
    if not writes:
        config.methods = (*config.methods, "surgery")
    if arg.runlocal:
        common.shrink(config)
    if arg.length:
        config.suite.max_length = arg.length
    return config


def _place(name: str, checkpoints: str) -> str:
    """A hub id, or where its copy is: of a repository under its name, of folders of one under theirs."""
    if checkpoints == "hub":
        return name
    _, repository, *inside = name.split("/")
    return "/".join([checkpoints, *(inside or [repository])])
