"""CART: task vectors taken from the average of the models, cut to low rank."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Transform, recentre


@method(
    "cart",
    Card(
        title="Revisiting Weight Averaging for Model Merging",
        arxiv="2412.12153",
        year=2024,
        summary="the average of the models plus a low-rank part of what each has besides",
        base="optional",
        released_code="decomposes attention and MLP matrices only (matrices='attn|mlp'), averages the others",
    ),
)
def cart(density: float = 0.12, strength: float = 2.0, solver: str = "gram", matrices: str = "") -> Transform:
    """``theta_avg + strength sum_t SVD_k(theta_t - theta_avg)``, k = max(1, int(density min(m, n))).

    Args:
      density: fraction of the rank that is kept (8 tasks, ViT-B/32).
      strength: lambda (8 tasks, ViT-B/32). 0 gives the average.
      solver: ``gram`` or ``svd``.
      matrices: regular expression of the matrices that are decomposed; the others are averaged.
    """
    return recentre(density, strength, solver, matrices)
