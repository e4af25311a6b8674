"""Five image tasks on EfficientNet-Lite0 from a folder of ``image_NAME.npz`` files (x_train, y_train, x_test, y_test).

python -m experiments.benchmark --config=configs/vision5.py:source=DATA --workdir=results/vision5
"""

from configs import common

TASKS = ("cifar10", "fashion_mnist", "mnist", "gtsrb", "dtd10")


def get_config(arg=None):
    """Arguments: ``source`` (the folder), ``runlocal`` (a run of seconds, for tests), ``seeds`` (how many)."""
    arg = common.parse_arg(arg, source="data", runlocal=False, seeds=3)
    config = common.benchmark("vision5", arg.seeds)
    config.model = "efficientnet_lite0"
    config.suite = common.suite("image", TASKS, source=arg.source, train=640, held_out=200, test=300, image_size=64)
    config.finetune.learning_rate = 2e-4
    config.finetune.steps = 40
    return common.shrink(config) if arg.runlocal else config
