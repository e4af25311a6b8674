"""taskvec: task vectors and adaptive model merging in JAX.

One pretrained model and several fine-tuned copies of it give task vectors (fine-tuned minus pretrained); chains of
small pure transforms turn them into one model that does all the tasks. Every transform of `taskvec.transforms` is here
under its own name.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from taskvec._version import __version__ as __version__

if TYPE_CHECKING:
    from taskvec._public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    # Imported late: jax takes a second to start, and the command line has other work for that second.
    if importlib.util.find_spec(f"taskvec.{name}"):
        return importlib.import_module(f"taskvec.{name}")
    return getattr(importlib.import_module("taskvec._public"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
