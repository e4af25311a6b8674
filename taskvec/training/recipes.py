"""How task vectors were made: published fine-tuning recipes as settings, and what optax makes of them.

The two that circulate for CLIP differ in six settings and give different task vectors; never mix them.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import optax

# Passes over the training rows in the open_clip line, about 2,000 steps of 128 rows each: the first eight tasks and
# ImageNet mlfoundations/task_vectors (src/finetune.py), the rest jzhang538/BadMerging (src/finetune_clean.py).
EPOCHS = {
    "cars": 35, "dtd": 76, "eurosat": 12, "gtsrb": 11, "mnist": 5, "resisc45": 15, "sun397": 14, "svhn": 4,
    "imagenet": 4, "stl10": 5, "cifar100": 5, "flowers102": 251, "pets": 77,
}  # fmt: skip
OTHERS = 2000  # steps of a task that is not in the table


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of one fine-tuning run: Adam with decoupled weight decay, linear warm-up, cosine to zero.

    Attributes:
      steps: of the optimiser; None takes a task's passes over its rows from `EPOCHS` (see `for_task`).
      batch_size: rows a step.
      learning_rate: peak.
      warmup: steps with rising learning rate; below 1, their share of all steps.
      weight_decay: decoupled, towards zero, of everything that is trained (AdamW); 0 is Adam.
      clip: largest global norm of a gradient; None for no limit.
      sam_rho: radius of sharpness-aware minimisation (arXiv 2010.01412), 0 for none; a step then takes two gradients.
    """

    steps: int | None
    batch_size: int
    learning_rate: float
    warmup: float = 0
    weight_decay: float = 0.0
    clip: float | None = None
    sam_rho: float = 0.0

    def __post_init__(self):
        least = {"steps": 1, "batch_size": 1, "learning_rate": 0, "warmup": 0, "weight_decay": 0, "sam_rho": 0}
        for name, value in least.items():
            if (found := getattr(self, name)) is not None and not value <= found < math.inf:
                raise ValueError(f"{name}={found}, must be at least {value}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip}, must be above 0, or None for no limit")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"a warm-up of {self.warmup:g} steps does not fit into {self.steps} steps; set warmup too")

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up."""
        return round(self.warmup * (self.steps or OTHERS)) if self.warmup < 1 else round(self.warmup)

    def for_task(self, task: str, rows: int) -> "Recipe":
        """The recipe with its steps settled: as they are, or ``epochs * ceil(rows / batch_size)``."""
        if self.steps is not None:
            return self
        steps = EPOCHS[task] * -(-rows // self.batch_size) if task in EPOCHS else OTHERS
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
        """Clipping, then Adam or AdamW (beta 0.9 and 0.999, epsilon 1e-8, as in PyTorch)."""
        adam = optax.adamw(self.schedule(), weight_decay=self.weight_decay)
        if not self.weight_decay:
            adam = optax.adam(self.schedule())
        return adam if self.clip is None else optax.chain(optax.clip_by_global_norm(self.clip), adam)

    def _settled(self) -> int:
        if self.steps is None:
            raise ValueError("steps is None, a number of passes over a task's rows: call for_task first")
        return self.steps


RECIPES: Mapping[str, Recipe] = {
    # mlfoundations/task_vectors and gortizji/tangent_task_arithmetic. The paper (arXiv 2212.04089) says 200 steps of
    # warm-up, the released code 500. Single precision; pictures are cropped at random (open_clip's training transform).
    "ft_ilharco": Recipe(None, 128, 1e-5, warmup=500, weight_decay=0.1, clip=1.0),
    # tanganke/fusion_bench, config/method/classification/clip_finetune.yaml.
    "ft_fusionbench": Recipe(4000, 128, 1e-5),
    # tanganke/peta, config/finetune_clip_standard.yaml; its batch size stands in files that were not seen.
    "ft_peta": Recipe(6000, 128, 1e-5, warmup=600, weight_decay=0.1),
    # Not published: for small suites of a few hundred rows.
    "small": Recipe(40, 32, 1e-4, warmup=0.1, clip=1.0),
}


def get(name: str) -> Recipe:
    """A recipe by name; raises `ValueError` that lists them."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there is {', '.join(RECIPES)}")
    return RECIPES[name]
