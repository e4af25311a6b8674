"""The main job of ``make quickstart``: see `configs/vision3.py`; here with the methods that tell the story."""

from configs import common, vision3


def get_config(arg=None):
    """Arguments: ``runlocal`` (a run of seconds, for tests), ``seeds`` (how many)."""
    arg = common.parse_arg(arg, runlocal=False, seeds=3)
    config = vision3.get_config(f"runlocal={arg.runlocal},seeds={arg.seeds}")
    config.name = "quickstart"
    if not arg.runlocal:
        config.suite.image_size = 48  # half the work of 64
    config.settings.adamerging.update({"steps": 50, "learning_rate": 5e-3})  # published: 500 steps of 1e-3
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
