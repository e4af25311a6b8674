"""Three image tasks on EfficientNet-Lite0: a convolutional network, the proof that any ``apply_fn`` will do.

    python -m experiments.benchmark --config=configs/vision3.py --workdir=results/vision3

Tasks: scikit-learn's digits, MNIST (5,000 images), animal silhouettes; fixed heads from the pretrained features.
"""

from configs import common


def get_config(arg=None):
    """Arguments: ``runlocal`` (a run of seconds, for tests), ``seeds`` (how many)."""
    arg = common.parse_arg(arg, runlocal=False, seeds=3)
    config = common.benchmark("vision3", arg.seeds)
    config.model = "efficientnet_lite0"
    tasks = ("digits", "mnist5k", "animals")
    config.suite = common.suite("image", tasks, train=640, held_out=256, test=1000, image_size=64)
    config.finetune.learning_rate = 2e-4
    config.finetune.steps = 40
    return common.shrink(config) if arg.runlocal else config
