"""Layer swapping: the middle of a task's expert between the ends of a language's expert."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, swap_layers


@method(
    "layer_swapping",
    Card(
        title="Layer Swapping for Zero-Shot Cross-Lingual Transfer in Large Language Models",
        arxiv="2410.01335",
        year=2024,
        summary="two experts: blocks of the first (a task) between bottom and top blocks of the second (a language)",
        released_code="not released. The block numbers are those reported for a model of 32 blocks; which expert the "
        "embeddings, the final norm and the head come from could not be found: the language's is our choice (outside=)",
        base="optional",
        tasks=(2, 2),
        ordered=True,
    ),
)
def layer_swapping(
    bottom: int | float = 5 / 32,
    top: int | float = 2 / 32,
    transition: int | float = 1 / 32,
    weight: float = 0.5,
    outside: str = "language",
) -> Chain:
    """``theta_l = w_l theta_l^language + (1 - w_l) theta_l^task`` for block l; give the task's expert first.

    w is 1 in the bottom and top blocks, `weight` in the transitions next to them, 0 between.

    Args:
      bottom, top, transition: numbers of blocks (integers), or fractions of the depth: 5, 2 and 1 of 32.
      weight: of the language's expert in the transitions.
      outside: where what is outside the blocks comes from: ``language``, ``task`` or ``mean``.
    """
    return chain(swap_layers(bottom, top, transition, weight, outside))
