"""Composition of sparse fine-tunings (LT-SFT)."""

from collections.abc import Sequence

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, scale as scale_by, sum_tasks, trim


@method(
    "lt_sft",
    Card(
        title="Composable Sparse Fine-Tuning for Cross-Lingual Transfer",
        arxiv="2110.07560",
        year=2021,
        summary="sum of sparse fine-tunings, such as one of a language and one of a task",
        released_code="leaves the heads of the language's fine-tuning out (include=...)",
    ),
)
def lt_sft(density: float = 1.0, scale: float = 1.0, weights: Sequence[float] | None = None) -> Chain:
    """``theta_0 + scale sum_t w_t phi_t``; entries that two fine-tunings changed add up.

    Args:
      density: 1 for models that were fine-tuned sparsely. For dense ones, the fraction kept, by one threshold of the
        whole model: the mask that LT-SFT takes from its first, dense phase (8 % for tasks, 4 % for languages). The
        second phase, which trains what is left once more, is not replaced by this.
      scale: factor of the sum.
      weights: one a fine-tuning; 1 if not given, as published.
    """
    return chain(trim(density), sum_tasks(weights), scale_by(scale))
