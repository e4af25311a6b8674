"""Result rows: one line of JSON a method and run, with all that is needed to compare, or to refuse to.

Accuracies under different protocols (checkpoint family, splits, heads) are different quantities: see
`check_same_protocol`.
"""

import dataclasses
import hashlib
import json
import pathlib
import platform
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from taskvec._version import __version__
from taskvec.modular.results import KINDS

DATA_ACCESS = ("none", "unlabelled test", "unlabelled train", "few labelled", "labelled train")


def peak_memory_mb() -> float:
    """Peak resident memory of this process, in MB (2^20 bytes): since it started, or since Linux was told to forget."""
    status = pathlib.Path("/proc/self/status")
    if status.is_file():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def versions() -> dict[str, str]:
    """Versions that a number may depend on, and the kind of device."""
    return {
        "taskvec": __version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One method on one suite and seed.

    Attributes:
      label: name of the run in its report.
      method: registry name.
      settings: everything the method was called with, JSON values.
      model: name of the pretrained checkpoint.
      suite: name of the set of tasks.
      protocol: tag of checkpoint family, splits and heads; rows compare only within one.
      data_access: of `DATA_ACCESS`.
      result: of `taskvec.modular.results.KINDS`.
      task_id_needed: whether the task must be known at test time.
      head_trained: whether heads were trained.
      accuracy: by task, fractions; where labels are numbers, a correlation.
      seconds: wall-clock time of the method, evaluation excluded.
      seed: of the run.
      config_hash: of the whole configuration.
      storage_bits: of all that a merge stores, the pretrained model included; None of what was not merged.
      normalised_accuracy: mean over tasks of ``accuracy_t / individual_t``; None if not known, see `with_normalised`.
      peak_memory_mb: peak resident memory of the process while the method ran and was scored, with all that it holds.
      versions: of libraries and device.
    """

    label: str
    method: str
    settings: Mapping[str, Any]
    model: str
    suite: str
    protocol: str
    data_access: str
    result: str
    task_id_needed: bool
    head_trained: bool
    accuracy: Mapping[str, float]
    seconds: float
    seed: int
    config_hash: str
    storage_bits: int | None = None
    normalised_accuracy: float | None = None
    peak_memory_mb: float = dataclasses.field(default_factory=peak_memory_mb)
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)

    def __post_init__(self):
        for name, allowed in (("data_access", DATA_ACCESS), ("result", KINDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if not self.accuracy or not all(-1 <= value <= 1 for value in self.accuracy.values()):
            raise ValueError(
                f"accuracies must be fractions (correlations from -1), at least one per task: {dict(self.accuracy)}"
            )

    @property
    def mean_accuracy(self) -> float:
        """Mean over tasks."""
        return float(np.mean(list(self.accuracy.values())))

    def to_dict(self) -> dict[str, Any]:
        """All attributes and the mean accuracy."""
        return {**dataclasses.asdict(self), "mean_accuracy": self.mean_accuracy}

    def to_json(self) -> str:
        """One line, keys sorted."""
        return json.dumps(self.to_dict(), sort_keys=True, default=_plain, allow_nan=False)


def with_normalised(rows: Sequence[Row]) -> list[Row]:
    """Fills in normalised accuracies from rows labelled ``individual``, of equal protocol, suite, model and seed."""
    key = lambda row: (row.protocol, row.suite, row.model, row.seed)
    individual = {key(row): row.accuracy for row in rows if row.label == "individual"}

    def normalised(row: Row) -> float | None:
        best = individual.get(key(row), {})
        ratios = [value / best[task] for task, value in row.accuracy.items() if best.get(task)]
        return float(np.mean(ratios)) if len(ratios) == len(row.accuracy) else None

    return [dataclasses.replace(row, normalised_accuracy=normalised(row)) for row in rows]


def check_same_protocol(rows: Sequence[Row]) -> None:
    """Raises `ValueError` unless all rows are of one protocol, suite and model; call it before averaging or ranking."""
    found = sorted({(row.protocol, row.suite, row.model) for row in rows})
    if len(found) > 1:
        listed = "; ".join(f"protocol {p}, suite {s}, model {m}" for p, s, m in found)
        raise ValueError(f"rows of different protocols are not comparable: {listed}. Select one of them first.")


def dumps(rows: Iterable[Row]) -> str:
    """Rows as JSON lines, the contents of ``result.jsonl``."""
    return "".join(row.to_json() + "\n" for row in rows)


def loads(text: str) -> list[Row]:
    """Rows of JSON lines that `dumps` made; raises `ValueError` naming the line that is none."""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            fields = json.loads(line)
            rows.append(Row(**{key: value for key, value in fields.items() if key != "mean_accuracy"}))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"line {number} is no result row: {error}") from error
    return rows


def config_hash(config: Mapping[str, Any]) -> str:
    """First 12 hex digits of the SHA-256 of the configuration as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=_plain).encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} is no JSON value")
