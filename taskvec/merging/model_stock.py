"""Model Stock: between the pretrained model and the average, as far as the angles allow."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, model_stock as model_stock_by


@method(
    "model_stock",
    Card(
        title="Model Stock: All we need is just a few fine-tuned models",
        arxiv="2403.19522",
        year=2024,
        summary="average of fine-tunings of one task, drawn to the pretrained model by their angle",
        released_code="not released; MergeKit's takes the mean cosine over pairs, as here, and divides by at least "
        "1e-6 in it (guards='mergekit')",
        tasks=(2, None),
    ),
)
def model_stock(axis: str | int = "tensor", clip: bool = False, guards: str = "none") -> Chain:
    """``theta_0 + t mean_k(tau_k)``, ``t = T cos / (1 + (T - 1) cos)``, tensor by tensor.

    For several fine-tunings of the *same* task. Vectors of different tasks are nearly orthogonal, and t nearly 0.

    Args:
      axis, clip, guards: see `taskvec.transforms.model_stock`.
    """
    return chain(model_stock_by(axis, clip, guards))
