"""Coefficients that were learned elsewhere, applied: what an adaptive method found, on checkpoints of any size."""

from collections.abc import Sequence

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, elect_signs, sum_by_name, trim
from taskvec.transforms.by_name import sum_by_part


def agreeing(plus_plus: bool | str) -> Chain:
    """AdaMerging++'s task vectors: the largest 20 % of each, without the entries against the elected sign.

    False leaves them as they are. ``"released"`` has the rules of the released code: one entry more is kept, and where
    signs cancel exactly the majority sign of the model is elected.

    Raises:
      ValueError: neither of these.
    """
    if plus_plus not in (False, True, "released"):
        raise ValueError(f"plus_plus={plus_plus!r}; allowed: False, True, 'released'")
    if plus_plus == "released":
        return chain(trim(density=0.2, rule="released"), elect_signs("majority"))
    return chain(trim(density=0.2), elect_signs()) if plus_plus else chain()


@method(
    "coefficients",
    Card(
        title="AdaMerging: Adaptive Model Merging for Multi-Task Learning",
        arxiv="2310.02575",
        year=2024,
        summary="weights by task and tensor from a file, as layer-wise adaptive methods learn them",
        ordered=True,
    ),
)
def coefficients(
    table: Sequence[tuple] = (),
    rest: float = 0.0,
    plus_plus: bool | str = False,
    file: str = "",
    parts: Sequence[int] = (),
) -> Chain:
    """``theta_l = theta0_l + sum_t lam_{l,t} tau_{l,t}`` for tensor l.

    `taskvec merge --method coefficients --set file=PATH` reads a file that `taskvec.io.coefficients.save` wrote: it
    brings the names of the model's tensors to those of the checkpoint and the experts, by their labels, to the order of
    the table; tensors that are not in the table are the base's.

    Args:
      table: pairs of a per-layer path (blocks/3/mlp/up/kernel) or, of checkpoints, a tensor's name, and T numbers. Of
        coefficients by random parts of tensors (aTLAS x K) rows as `taskvec.transforms.by_name.sum_by_part` has them.
      rest: coefficient of every task vector in tensors that the table does not name.
      plus_plus: of task vectors that are trimmed and sign-elected first, as AdaMerging++ learns them; see `agreeing`.
      file: where the table comes from; read by the command alone.
      parts: K, seed and whether tensors of equal shape share them, of random parts; none without.
    """
    if file and not table:
        raise ValueError(
            "file= is read by `taskvec merge`; in memory pass table=found.table(), parts=found.drawn of "
            "found = taskvec.io.coefficients.load(file)"
        )
    rows = tuple((row[0], tuple(float(w) for w in row[1]), *row[2:]) for row in table)
    if not (parts and rows):
        return chain(agreeing(plus_plus), sum_by_name(rows, rest))
    rows = tuple((name, weights, path, tuple(strides)) for name, weights, path, strides in rows)
    return chain(agreeing(plus_plus), sum_by_part(rows, *parts, rest=rest))
