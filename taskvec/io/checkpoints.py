"""Resumable training state: the one file that knows orbax.

Steps lie in numbered folders that appear whole or not at all, so a run killed while it saves resumes from the step
before. Only arrays are stored: a typed PRNG key is refused (store the seed and fold in the step instead).
"""

import copy
import logging
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from taskvec import tree as trees

log = logging.getLogger(__name__)

FORMAT = 1


class Checkpoint:
    """Saves and restores a tree of arrays by step; the object that `taskvec.adaptive.fit` takes as `checkpoint`."""

    def __init__(
        self,
        directory: str | os.PathLike,
        every: int,
        keep: int = 2,
        seconds: float = 0.0,
        on_save: Callable[[], None] | None = None,
    ):
        """Opens `directory`, which is made if absent.

        Args:
          directory: of this run alone.
          every: steps between two checkpoints.
          keep: how many of the latest to keep.
          seconds: between two checkpoints, at least; that of the last step does not wait.
          on_save: called after every save.
        """
        if every < 1 or keep < 1:
            raise ValueError(f"every and keep must be at least 1, found every={every}, keep={keep}")
        self.directory = pathlib.Path(directory).expanduser().absolute()
        self.every, self._settings = every, (every, keep, seconds, on_save)
        self._seconds, self._on_save, self._last = seconds, on_save, time.monotonic()
        self._parts: list[Checkpoint] = []
        self._run: dict[str, str] = {}
        # In step with the run: an asynchronous save could read a buffer that the next step was given to overwrite.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._saved = self._manager.latest_step() or 0

    def should_save(self, step: int) -> bool:
        """Whether `every` steps (and `seconds`) have passed since the last checkpoint.

        `fit` asks at the end of a chunk.
        """
        waited = time.monotonic() - self._last >= self._seconds
        return waited and step // self.every > self._saved // self.every

    def save(self, step: int, state: Any) -> None:
        """Saves `state` (jax or numpy arrays) as of after `step` steps; returns once it is on disk.

        Raises:
          TypeError: a leaf is no array, or is a typed PRNG key.
        """
        odd = [path for path, leaf in trees.flatten(state).items() if not _is_array(leaf)]
        if odd:
            raise TypeError(f"only arrays are saved, so that a resumed run is the same run; these are not: {odd}")
        # orbax restores numpy leaves without a device; one kind of leaf keeps save and restore alike.
        arrays = jax.tree.map(jnp.asarray, state)
        meta = {"format": FORMAT, "run": self._run, "shapes": _shapes(arrays)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=items, force=True)
        self._saved, self._last = step, time.monotonic()
        if self._on_save is not None:
            self._on_save()

    def restore(self, abstract_state: Any) -> tuple[int, Any] | None:
        """Returns (step, state) of the latest checkpoint, or None if there is none.

        Args:
          abstract_state: tree of arrays or `jax.ShapeDtypeStruct`; gives structure, dtypes and shardings.

        Raises:
          ValueError: the checkpoint is of another run (see `of`) or state (names or shapes differ).
        """
        step, meta = self._latest()
        if step is None:
            return None
        self._refuse(_differences(meta["shapes"], _shapes(abstract_state)))
        abstract = jax.tree.map(_abstract, abstract_state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        log.info("resuming from step %d of %s", step, self.directory)
        return step, self._manager.restore(step, args=items).state

    def of(self, run: dict[str, str]) -> "Checkpoint":
        """The same folder for one run: it and its parts save what the run depends on, and refuse another's state.

        Args:
          run: what it depends on, ``{what: text}``; errors name what differs.

        Raises:
          ValueError: it holds a checkpoint of another run.
        """
        same = copy.copy(self)
        same._run = dict(run)
        same._latest()
        return same

    def part(self, name: str) -> "Checkpoint":
        """One for a part of the run, in a folder of its own; closed with this one. The name is no number."""
        self._parts.append(Checkpoint(self.directory / name, *self._settings))
        return self._parts[-1].of(self._run) if self._run else self._parts[-1]  # may be told its run later

    def _latest(self) -> tuple[int | None, dict[str, Any]]:
        """The latest step, if there is one, and what was noted with it."""
        step = self._manager.latest_step()
        if step is None:
            return None, {}
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        # No "run": saved before runs were noted.
        self._refuse(_differences(meta.get("run", {}), self._run))
        return step, meta

    def _refuse(self, differences: list[str]) -> None:
        if differences:
            raise ValueError(
                f"{self.directory} was written with another configuration ({', '.join(differences[:4])}); continue "
                "with that one, or choose an empty directory to start anew"
            )

    def close(self) -> None:
        """Releases the directory."""
        for part in self._parts:
            part.close()
        self._manager.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _shapes(state: Any) -> dict[str, str]:
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in trees.flatten(state).items()}


def _differences(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """What differs, in the order of what is wanted."""
    names = [*wanted, *sorted(found.keys() - wanted.keys())]
    get = lambda given, name: given.get(name, "absent")
    return [
        f"{name}: {get(found, name)} saved, {get(wanted, name)} wanted"
        for name in names
        if found.get(name) != wanted.get(name)
    ]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
