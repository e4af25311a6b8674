"""What every experiment begins with: a model, a suite of tasks, fixed heads, and experts (from the cache if possible)."""

import hashlib
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

import taskvec as tv
from taskvec import models, vectors
from taskvec.data import batches, suites, wheels
from taskvec.data.base import Task
from taskvec.io import safetensors
from taskvec.io.progress import bar, say
from taskvec.training import finetune, heads
