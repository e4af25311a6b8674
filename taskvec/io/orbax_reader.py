"""Orbax checkpoints as models: a tree's leaves by their paths, restored one whole leaf at a time."""

import math
import pathlib
import threading
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from taskvec import tree as trees

_TREE = "_METADATA"


def find(path: pathlib.Path) -> pathlib.Path | None:
    """The folder of the tree in an orbax checkpoint, or in the latest of its numbered steps; ``None`` if there is none.

    Raises:
      ValueError: the step holds several trees; names them.
    """
    if (path / _TREE).is_file():
        return path
    steps = [child for child in path.iterdir() if child.name.isdigit() and child.is_dir()]
    step = max(steps, key=lambda child: int(child.name)) if steps else path
    items = sorted(child for child in step.iterdir() if (child / _TREE).is_file())
    if len(items) > 1:
        raise ValueError(f"{step} holds several trees: name one of {', '.join(map(str, items))}")
    return items[0] if items else None


class OrbaxReader:
    """Reads the leaves of a checkpoint. A leaf is restored whole, even for some of its rows, and the last one is kept.

    Attributes:
      specs: path -> shape and dtype, from the checkpoint's metadata.
      files: all files of the checkpoint.
    """

    def __init__(self, folder: pathlib.Path):
        """Opens the folder of a tree of arrays under dicts; raises `ValueError` if it is another tree."""
        self.folder = folder.absolute()
        self.files = tuple(sorted(path for path in self.folder.rglob("*") if path.is_file()))
        self._lock = threading.Lock()
        self._last: tuple[str, Any] = ("", None)
        with ocp.PyTreeCheckpointer() as checkpointer:
            self._tree = checkpointer.metadata(self.folder).item_metadata.tree
        flat = trees.flatten(self._tree)
        if not isinstance(self._tree, dict) or trees.flatten(trees.unflatten(flat)).keys() != flat.keys():
            raise ValueError(f"{folder} is no tree of dicts of arrays")
        odd = [path for path, leaf in flat.items() if getattr(leaf, "shape", None) is None]
        if odd:
            raise ValueError(f"{folder} holds leaves that are no arrays: {', '.join(odd[:4])}")
        self.specs = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat.items()}

    def path_of(self, name: str) -> pathlib.Path:
        """The checkpoint's folder."""
        return self.folder

    def held(self, name: str) -> int:
        """Bytes that reading rows of a leaf takes besides them: the leaf, and once more while it is restored."""
        spec = self.specs[name]
        return 2 * math.prod(spec.shape) * spec.dtype.itemsize

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A leaf, or some of its rows."""
        with self._lock:
            if self._last[0] != name:
                self._last = ("", None)
                self._last = (name, self._restore(name))
            array = self._last[1]
        return array if rows is None else array[rows]

    def _restore(self, name: str) -> np.ndarray:
        item = trees.unflatten({name: 0})
        how = ocp.args.PyTreeRestore(
            item=item,
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item),
            partial_restore=True,
        )
        with ocp.PyTreeCheckpointer() as checkpointer:
            return np.asarray(trees.flatten(checkpointer.restore(self.folder, args=how))[name])
