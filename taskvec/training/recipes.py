"""How task vectors were made: published fine-tuning recipes as settings, and what optax makes of them.

Those that circulate for CLIP differ in six settings and give different task vectors; never mix them.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from taskvec.tree import Tree

# Passes over the training rows, about 2,000 steps of 128 rows each, by the family of checkpoints that a suite is of.
# mlfoundations/task_vectors, src/finetune.py (gortizji/tangent_task_arithmetic has the same):
_ILHARCO = {
    "cars": 35, "dtd": 76, "eurosat": 12, "gtsrb": 11, "mnist": 5, "resisc45": 15, "sun397": 14, "svhn": 4,
}  # fmt: skip
# nik-dim/tall_masks, finetune.py:
_TALL_MASKS = _ILHARCO | {
    "stl10": 60, "pets": 82, "flowers102": 147, "cifar100": 6, "pcam": 1, "fer2013": 10, "cifar10": 6, "food101": 4,
    "fashion_mnist": 5, "rendered_sst2": 39, "emnist": 2, "kmnist": 5,
}  # fmt: skip
EPOCHS: Mapping[str, Mapping[str, int]] = {"task_vectors": _ILHARCO, "tall_masks": _TALL_MASKS}
OTHERS = 2000  # steps of a task of no such family
ACCUMULATE_BY = ("mean", "sum")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of one fine-tuning run: Adam with decoupled weight decay, linear warm-up, cosine to zero.

    Attributes:
      steps: of the optimiser; None takes a task's passes over its rows from `EPOCHS` (see `for_task`).
      batch_size: rows per batch.
      learning_rate: peak.
      warmup: steps with rising learning rate; below 1, their share of all steps.
      weight_decay: decoupled, towards zero, of everything that is trained (AdamW); 0 is Adam. Not of a tensor that has
        had no gradient: what the loss does not depend on keeps its bits, as in PyTorch.
      clip: largest global norm of a gradient; None for no limit.
      sam_rho: radius of sharpness-aware minimisation (arXiv 2010.01412), 0 for none; a step then takes two gradients.
      accumulate: batches a step of the optimiser. Warm-up and schedule count steps; progress, metrics and checkpoints
        of a run count batches.
      accumulate_by: ``mean`` of the batches' gradients, as of one large batch, or their ``sum``; clipping comes after.
      label_smoothing: e in ``(1 - e) CE + e mean_c(-log p_c)``, the mean over a task's classes.
      dropout: rate inside the encoder, see `taskvec.models.layers.Options`; the model must take ``dropout, key``.
    """

    steps: int | None
    batch_size: int
    learning_rate: float
    warmup: float = 0
    weight_decay: float = 0.0
    clip: float | None = None
    sam_rho: float = 0.0
    accumulate: int = 1
    accumulate_by: str = "mean"
    label_smoothing: float = 0.0
    dropout: float = 0.0

    def __post_init__(self):
        least = {
            "steps": 1, "batch_size": 1, "learning_rate": 0, "warmup": 0, "weight_decay": 0, "sam_rho": 0,
            "accumulate": 1,
        }  # fmt: skip
        for name, value in least.items():
            if (found := getattr(self, name)) is not None and not value <= found < math.inf:
                raise ValueError(f"{name}={found}, must be at least {value}")
        for name in ("label_smoothing", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, must be in [0, 1)")
        if self.accumulate_by not in ACCUMULATE_BY:
            raise ValueError(f"accumulate_by={self.accumulate_by!r}; allowed: {', '.join(ACCUMULATE_BY)}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip}, must be above 0, or None for no limit")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"a warm-up of {self.warmup:g} steps does not fit into {self.steps} steps; set warmup too")

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up."""
        return round(self.warmup * (self.steps or OTHERS)) if self.warmup < 1 else round(self.warmup)

    @property
    def batches(self) -> int:
        """Batches of a whole run."""
        return self._settled() * self.accumulate

    def for_task(self, task: str, rows: int, family: str = "") -> "Recipe":
        """The recipe with its steps settled: as they are, or ``epochs * ceil(rows / batch_size) // accumulate``.

        Args:
          task: name.
          rows: of its training split.
          family: of checkpoints, whose passes over the rows they are; one without a table in `EPOCHS` has `OTHERS`.

        Raises:
          ValueError: the family has a table without this task; or few rows make fewer steps than the warm-up.
        """
        if self.steps is not None:
            return self
        if family not in EPOCHS:
            return dataclasses.replace(self, steps=OTHERS)
        if task not in EPOCHS[family]:
            raise ValueError(
                f"{family} has no {task!r}, so its passes over the rows are not known; it has "
                f"{', '.join(EPOCHS[family])}. Set steps, or take another family"
            )
        steps = EPOCHS[family][task] * -(-rows // self.batch_size) // self.accumulate
        return dataclasses.replace(self, steps=steps)

    def with_steps(self, steps: int) -> "Recipe":
        """The same in another number of steps, the warm-up in proportion."""
        warmup = self.warmup if self.warmup < 1 else int(self.warmup * steps / (self.steps or OTHERS))
        return dataclasses.replace(self, steps=steps, warmup=warmup)

    def schedule(self) -> optax.Schedule:
        """``lr (s + 1) / w`` for steps s below w, then ``lr (1 + cos(pi (s - w) / (S - w))) / 2``."""
        rate, warmup, steps = self.learning_rate, self.warmup_steps, self._settled()

        def at(step):
            falling = 0.5 * (1 + jnp.cos(math.pi * jnp.clip((step - warmup) / (steps - warmup), 0, 1)))
            return rate * jnp.where(step < warmup, (step + 1) / max(warmup, 1), falling)

        return at

    def optimiser(self) -> optax.GradientTransformation:
        """Clipping, then Adam or AdamW (beta 0.9 and 0.999, epsilon 1e-8, as in PyTorch).

        Its input is the mean gradient of a step's batches, `adaptive.fit.make_fit`'s.
        """
        parts = [optax.scale(self.accumulate)] if self.accumulate > 1 and self.accumulate_by == "sum" else []
        parts += [] if self.clip is None else [optax.clip_by_global_norm(self.clip)]
        parts += [optax.scale_by_adam()] + ([_decay(self.weight_decay)] if self.weight_decay else [])
        return optax.chain(*parts, optax.scale_by_learning_rate(self.schedule()))

    def _settled(self) -> int:
        if self.steps is None:
            raise ValueError("steps is None, a number of passes over a task's rows: call for_task first")
        return self.steps


def _decay(rate: float) -> optax.GradientTransformation:
    """Adds ``rate * x`` to Adam's updates, but to one that is zero throughout: that leaf has had no gradient.

    A leaf that the loss depends on may have none in its first steps (LoRA's A while B is zero) and rests as long, where
    PyTorch's would decay.
    """

    def update(updates: Tree, state: optax.EmptyState, params: Tree) -> tuple[Tree, optax.EmptyState]:
        decayed = lambda u, x: u + jnp.where((u != 0).any(), rate, 0).astype(u.dtype) * x
        return jax.tree.map(decayed, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


_OPEN_CLIP = Recipe(None, 128, 1e-5, warmup=500, weight_decay=0.1, clip=1.0)
RECIPES: Mapping[str, Recipe] = {
    # mlfoundations/task_vectors, gortizji/tangent_task_arithmetic, nik-dim/tall_masks. The paper (arXiv 2212.04089)
    # says 200 steps of warm-up, the released code 500. Single precision; pictures are cropped at random (open_clip's
    # training transform).
    "ft_ilharco": _OPEN_CLIP,
    # The last two for ViT-L/14. Their code adds the gradients of the two batches up, so that clipping bites earlier.
    "ft_ilharco_l14": dataclasses.replace(_OPEN_CLIP, batch_size=64, accumulate=2, accumulate_by="sum"),
    # tanganke/fusion_bench, config/method/classification/clip_finetune.yaml. Its docs say 32 rows instead.
    "ft_fusionbench": Recipe(4000, 128, 1e-5),
    # tanganke/peta, config/finetune_clip_standard.yaml and config/model/ViT-B-16.yaml. There the first step has the
    # peak rate, and every later one the rate that is due a step before.
    "ft_peta": Recipe(6000, 64, 1e-5, warmup=600, weight_decay=0.1),
    # Not published: for small suites of a few hundred rows.
    "small": Recipe(40, 32, 1e-4, warmup=0.1, clip=1.0),
}


def get(name: str) -> Recipe:
    """A recipe by name; raises `ValueError` that lists them."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there is {', '.join(RECIPES)}")
    return RECIPES[name]
