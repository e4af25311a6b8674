"""DARE: drop entries at random and rescale, then merge."""

from taskvec.merging.registry import Card, method
from taskvec.merging.ties import aggregate_by
from taskvec.transforms import Chain, chain, drop, elect_signs, scale as scale_by, sum_tasks, trim

_CARD = {
    "title": "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    "arxiv": "2311.03099",
    "year": 2023,
    "ordered": True,
}


@method("dare", Card(**_CARD, summary="random 10 % of each task vector, rescaled, then task arithmetic"))
def dare(density: float = 0.1, scale: float = 0.3, rescale: str = "inverse_density", seed: int = 0) -> Chain:
    """``theta_0 + scale sum_t m_t tau_t / density`` with ``m_t ~ Bernoulli(density)``; drop rate p = 1 - density."""
    return chain(drop(density, rescale, seed), sum_tasks(), scale_by(scale))


@method(
    "dare_ties",
    Card(
        **_CARD,
        summary="random part of each task vector, rescaled, then TIES",
        released_code="merges with TIES' own trimming of the dropped vectors on top (trim_density=0.2)",
    ),
)
def dare_ties(
    density: float = 0.1,
    scale: float = 1.0,
    trim_density: float = 1.0,
    aggregate: str = "mean",
    rescale: str = "inverse_density",
    seed: int = 0,
) -> Chain:
    """TIES on vectors thinned by DARE; `trim_density` 1 leaves out TIES' trimming, since DARE thins already."""
    return chain(
        drop(density, rescale, seed), trim(trim_density), elect_signs(), aggregate_by(aggregate), scale_by(scale)
    )
