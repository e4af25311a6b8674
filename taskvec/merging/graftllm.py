"""GraftLLM's compression of task vectors, without data: ranks by module, vectors rounded in bands."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, keep_by_rules

RANKS = ((r"attn|attention", 1000), (r"mlp|feed_forward", 1400))
BANDS = ((20, 8), (200, 4), (None, 2))  # published, for GPTQ


@method(
    "graft_compress",
    Card(
        title="Knowledge Grafting of Large Language Models",
        arxiv="2505.18502",
        year=2025,
        summary="one model per task: singular vectors by module, the leading ones in more bits",
        result="task-conditioned",
        released_code="rounds by GPTQ with activations of calibration texts; here, with bands, to the nearest level. "
        "Drops the changes of all other modules: end ranks with ('', 0)",
    ),
)
def graft_compress(ranks: tuple = RANKS, bands: tuple = (), group: int = 128, solver: str = "gram") -> Chain:
    """``theta_0 + U_t S_t V_t`` with as many triplets as the first matching rule says, U and V in few bits.

    Args:
      ranks: ``((regular expression of the path, rank), ...)``; tensors without a rule are kept whole.
      bands: ``((end, bits), ...)``; ``()`` does not round. The paper's, for GPTQ, are ``BANDS``: the first 20
        triplets in 8 bits, up to number 200 in 4, the rest in 2.
      group: entries of a vector with levels of their own.
      solver: ``gram`` or ``svd``.
    """
    return chain(keep_by_rules(ranks, bands, group, solver))
