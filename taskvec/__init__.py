"""taskvec: task vectors and adaptive model merging in JAX.

One pretrained model and several fine-tuned copies of it give task vectors (fine-tuned minus pretrained); chains of
small pure transforms turn them into one model that does all the tasks. Every transform of `taskvec.transforms` is here
under its own name.
"""

from taskvec import transforms as _transforms
from taskvec._version import __version__ as __version__
from taskvec.merging import merge, methods
from taskvec.transforms import *  # noqa: F403
from taskvec.vectors import task_vectors

__all__ = ["merge", "methods", "task_vectors", *_transforms.__all__]
