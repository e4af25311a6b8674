"""What every main does first: quiet logs, readable messages, and compiled programs kept between runs."""

import logging
import pathlib

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags
from rich.logging import RichHandler

from taskvec import host
from taskvec.io.progress import console

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/FILE.py[:ARGS]", lock_config=True)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "whether this is one of several processes that JAX knows of")
WORKDIR = flags.DEFINE_string("workdir", None, "folder for the results; results/NAME by default")
flags.mark_flag_as_required("config")


def start(argv: list[str]) -> tuple:
    """Sets logging and jax's compilation cache up; returns the config and the folder for results."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; a value of the config is set as --config.key=value")
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    absl.logging.set_verbosity(absl.logging.WARNING)
    log = logging.getLogger("taskvec")
    log.addHandler(RichHandler(console=console, show_time=False, show_level=False, show_path=False))
    log.propagate = False
    log.setLevel(logging.INFO)
    host.keep_programs()
    return CONFIG.value, pathlib.Path(WORKDIR.value or f"results/{CONFIG.value.name}")
