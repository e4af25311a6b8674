"""What `import taskvec` gives; `taskvec/__init__.py` imports it when it is first asked for."""

from taskvec import transforms as _transforms
from taskvec.merging import merge, methods
from taskvec.transforms import *  # noqa: F403
from taskvec.vectors import task_vectors

__all__ = ["merge", "methods", "task_vectors", *_transforms.__all__]
