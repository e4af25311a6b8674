"""NearSwap: another model's weights where they are near, a bounded step towards them elsewhere."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, clip_entries, sum_tasks


@method(
    "nearswap",
    Card(
        title="Arcee's MergeKit: A Toolkit for Merging Large Language Models",
        arxiv="2403.13257",
        year=2024,
        summary="clips every entry of one task vector",
        released_code="the setting is called t; entries and t below 1e-6 are shrunk further (floor=1e-6). From the "
        "model card of QuartetAnemoi-70B-t0.0001; there is no paper",
        tasks=(1, 1),
    ),
)
def nearswap(limit: float = 1e-4, floor: float = 0.0) -> Chain:
    """``theta_0 + clip(tau, -limit, limit)``, which is the interpolation with weight ``min(1, limit / |tau|)``.

    Args:
      limit, floor: see `clip_entries`.
    """
    return chain(clip_entries(limit, floor), sum_tasks())
