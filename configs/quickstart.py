"""The main job of ``make quickstart``: see `configs/vision3.py`; here with the methods that tell the story."""

from configs import common, vision3


def get_config(arg=None):
    """Arguments: ``runlocal`` (a run of seconds, for tests), ``seeds`` (how many)."""
    arg = common.parse_arg(arg, runlocal=False, seeds=3)
    config = vision3.get_config(f"runlocal={arg.runlocal},seeds={arg.seeds}")
    config.name = "quickstart"
    if not arg.runlocal:
        config.suite.update({"image_size": 48, "test": 500, "held_out": 192})
        # Published: 500 steps of 1e-3 with 16 rows per task. That is in vision3 and costs minutes.
        config.settings.adamerging.update({"steps": 30, "learning_rate": 5e-3, "per_task": 8})
        config.settings.task_arithmetic.scale = (0.3, 0.5, 0.7)
        config.settings.ties.scale = (0.7, 1.0, 1.3)
    config.settings.surgery.on = config.settings.surgery_inductive.on = "tsv_m"
    config.methods = (
        "pretrained",
        "weight_average",
        "task_arithmetic",
        "ties",
        "tsv_m",
        "adamerging",
        "surgery",
        "surgery_inductive",
        "individual",
    )
    return config
