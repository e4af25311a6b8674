"""MergeKit's methods as chains, with MergeKit's names, settings and defaults.

Numbers are those of mergekit 0.1.5 in float32. Its bfloat16 arithmetic is not imitated: ours is float32 to the end.
Entries of equal magnitude at a threshold are all kept (MergeKit picks some), random masks are other ones, and
thresholds and norms have no absolute floors except where a floor defines the number (`sce`, `model_stock`, `nearswap`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from taskvec import transforms as tf
from taskvec.transforms import Chain, Transform, chain
from taskvec.transforms.geometry import NEARLY_ONE

REQUIRED = object()


class Kind(NamedTuple):
    """What a method of MergeKit takes.

    Attributes:
      base: ``required`` (task vectors start at it), ``optional``, ``first`` (it is the first of the models to merge) or
        ``input`` (one of the models to merge, no more).
      models: how many models are merged, at least and at most; the base counts if it is one of them.
      each: settings that every model has an own value of, and their defaults.
      shared: settings of the merge.
      build: ``(settings, number of models) -> Chain``; those of `each` are tuples.
    """

    base: str
    models: tuple[int, int | None]
    each: Mapping[str, Any]
    shared: Mapping[str, Any]
    build: Callable[[dict, int], Chain]


def chain_of(
    name: str, weights: Sequence[float] | None = None, densities: Sequence[float] | None = None, **parameters: Any
) -> Chain:
    """The chain that does what the method `name` of MergeKit does.

    >>> ties = chain_of("ties", weights=[0.5, 1.0], densities=[0.2, 0.3], **{"lambda": 0.7})

    Which models it runs on: ``merge(chain, base, others)`` for methods with a required base; for the others
    ``merge(chain, None, models)``, with base_model first for ``slerp``. With ``nuslerp`` and ``multislerp`` the base
    decides whether vectors or weights are interpolated.

    Args:
      name: one of `KINDS`.
      weights, densities: one per model: ``weight`` and ``density``.
      **parameters: by MergeKit's names; those that every model has its own of may be sequences.

    Raises:
      ValueError: unknown method or setting, a missing weight, numbers out of range.
    """
    kind = kind_of(name)
    given = {**parameters, **({} if weights is None else {"weight": weights})}
    given |= {} if densities is None else {"density": densities}
    unknown = sorted(given.keys() - kind.each.keys() - kind.shared.keys())
    if unknown:
        raise ValueError(f"{name} has no setting {unknown[0]!r}; it has {', '.join([*kind.each, *kind.shared])}")
    lengths = {len(v) for k, v in given.items() if k in kind.each and isinstance(v, Sequence)}
    if len(lengths) > 1:
        raise ValueError(f"settings for different numbers of models: {sorted(lengths)}")
    count = lengths.pop() if lengths else kind.models[0]
    settings = {}
    for key, default in {**kind.each, **kind.shared}.items():
        value = given.get(key, default)
        if value is REQUIRED:
            raise ValueError(f"{name} needs {key}")
        many = key in kind.each and not isinstance(value, Sequence)
        settings[key] = (value,) * count if many else tuple(value) if key in kind.each else value
    return kind.build(settings, count)


def kind_of(name: str) -> Kind:
    """What the method `name` takes; raises `ValueError` for an unknown one."""
    if name not in KINDS:
        raise ValueError(f"unknown method {name!r}; of MergeKit's there are: {', '.join(sorted(KINDS))}")
    return KINDS[name]


def _linear(s: dict, count: int) -> Chain:
    total = sum(s["weight"])
    if s["normalize"] and total == 0:
        raise ValueError("the weights add up to 0: change them, or set normalize to false")
    return chain(tf.sum_tasks(tuple(w / total for w in s["weight"]) if s["normalize"] else s["weight"]))


def _passthrough(s: dict, count: int) -> Chain:
    return chain(tf.sum_tasks(tuple(1.0 if factor is None else factor for factor in s["scale"])))


def _arithmetic(sparsify: Callable[[dict, tuple], Transform] | None, elect: bool) -> Callable[[dict, int], Chain]:
    """Task arithmetic, generalised: sparsify, weigh, elect signs, add up, divide by the weights that are left."""

    def build(s: dict, count: int) -> Chain:
        weights, stages = s["weight"], []
        if sparsify is not None:
            density = tuple(min(d, 1.0) for d in s["density"])
            if min(density) <= 0:  # of such a model nothing is kept
                stages.append(tf.weigh(tuple(float(d > 0) for d in density)))
                density = tuple(d if d > 0 else 1.0 for d in density)
            stages.append(sparsify(s, density))
        if elect:
            stages += [tf.weigh(weights), tf.elect_signs("positive")]
            stages.append(tf.weighted_disjoint_mean(weights) if s["normalize"] else tf.sum_tasks())
        else:
            total = sum(weights)
            divide = s["normalize"] and abs(total) >= 1e-8
            stages.append(tf.sum_tasks(tuple(w / total for w in weights) if divide else weights))
        return chain(*stages, tf.scale(s["lambda"]))

    return build


def _rescale(s: dict) -> str:
    return "l1" if s["rescale"] else "none"


def _trim(s: dict, density: tuple) -> Transform:
    return tf.trim(density, "tensor", "paper", _rescale(s))


def _drop(s: dict, density: tuple) -> Transform:
    return tf.drop(density, _rescale(s), s["seed"])


def _band(s: dict, density: tuple) -> Transform:
    return tf.keep_band(density, tuple(s["gamma"]), _rescale(s))


def _drop_by_rank(s: dict, density: tuple) -> Transform:
    for d, epsilon in zip(density, s["epsilon"], strict=True):
        if d < 1 and not 0 < d - epsilon <= d + epsilon < 1:
            raise ValueError(f"density - epsilon and density + epsilon must lie in (0, 1), got {d} and {epsilon}")
    pairs = zip(density, s["epsilon"], strict=True)
    return tf.each_task(*(tf.drop_by_rank(d, 2 * epsilon, _rescale(s), 1, s["seed"]) for d, epsilon in pairs))


def _slerp(s: dict, count: int) -> Chain:
    return chain(tf.slerp(s["t"], "weights", "tensor", 0.9995))


def _nuslerp(s: dict, count: int) -> Chain:
    first, second = s["weight"]
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    axis = "tensor" if s["nuslerp_flatten"] else 0 if s["nuslerp_row_wise"] else -1
    return chain(tf.slerp(t, "vectors", axis, NEARLY_ONE))


def _multislerp(s: dict, count: int) -> Chain:
    if count == 1:
        return chain(tf.sum_tasks())
    return chain(tf.mean_on_sphere(s["weight"], 0, 0.0, "vectors", s["normalize_weights"]))


def _karcher(s: dict, count: int) -> Chain:
    return chain(tf.mean_on_sphere(None, s["max_iter"], s["tol"], "weights"))


def _model_stock(s: dict, count: int) -> Chain:
    return chain(tf.model_stock(-1 if s["filter_wise"] else "tensor", False, "mergekit"))


def _sce(s: dict, count: int) -> Chain:
    if s["select_topk"] <= 0:
        raise ValueError(f"select_topk must lie in (0, 1], got {s['select_topk']}")
    return chain(tf.select_calculate_erase(min(s["select_topk"], 1.0), True, "selected", "mergekit"))


def _ram(s: dict, count: int) -> Chain:
    return chain(tf.merge_overlap(s["epsilon"], s.get("r", 0.0), s.get("alpha", 0.0), "tensor"))


def _generalised(sparsify: Callable | None, elect: bool, normalize: bool, rescale: bool, **more: float) -> Kind:
    each = {"weight": REQUIRED, "density": 1.0, **more}
    shared = {"normalize": normalize, "rescale": rescale, "lambda": 1.0, "int8_mask": False}
    # The seed is --random-seed of MergeKit's command line; here every tensor and model has its own stream.
    shared |= {"seed": 0} if sparsify in (_drop, _drop_by_rank) else {}
    return Kind("required", (1, None), each, shared, _arithmetic(sparsify, elect))


_WEIGHT = {"weight": REQUIRED}

KINDS: dict[str, Kind] = {
    "linear": Kind("input", (1, None), _WEIGHT, {"normalize": True}, _linear),
    "passthrough": Kind("input", (1, 1), {"scale": None}, {}, _passthrough),
    "task_arithmetic": _generalised(None, False, False, False),
    "ties": _generalised(_trim, True, True, False),
    "dare_linear": _generalised(_drop, False, False, True),
    "dare_ties": _generalised(_drop, True, False, True),
    "breadcrumbs": _generalised(_band, False, False, False, gamma=0.01),
    "breadcrumbs_ties": _generalised(_band, True, False, False, gamma=0.01),
    "della": _generalised(_drop_by_rank, True, True, True, epsilon=0.15),
    "della_linear": _generalised(_drop_by_rank, False, False, True, epsilon=0.15),
    "sce": Kind("required", (1, None), {}, {"select_topk": 1.0, "int8_mask": False}, _sce),
    "ram": Kind("required", (1, None), {}, {"epsilon": 1e-5}, _ram),
    "ramplus_tl": Kind("required", (1, None), {}, {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}, _ram),
    "slerp": Kind("first", (2, 2), {}, {"t": REQUIRED}, _slerp),
    "nuslerp": Kind("optional", (2, 2), _WEIGHT, {"nuslerp_flatten": True, "nuslerp_row_wise": False}, _nuslerp),
    "multislerp": Kind("optional", (1, None), _WEIGHT, {"normalize_weights": True, "eps": 1e-8}, _multislerp),
    "karcher": Kind("input", (1, None), {}, {"max_iter": 10, "tol": 1e-5}, _karcher),
    "model_stock": Kind("required", (2, None), {}, {"filter_wise": False}, _model_stock),
    "nearswap": Kind(
        "required", (1, 1), {}, {"t": REQUIRED}, lambda s, count: chain(tf.clip_entries(s["t"], 1e-6), tf.sum_tasks())
    ),
    "arcee_fusion": Kind("required", (1, 1), {}, {}, lambda s, count: chain(tf.keep_important(), tf.sum_tasks())),
}
