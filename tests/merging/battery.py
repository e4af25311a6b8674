"""What every registered method must satisfy, as functions of a `Method`; see test_battery.py.

A new method is covered the moment it is registered and has an oracle. How many tasks it takes, and whether their order
matters, is on its card.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec import tree as trees
from taskvec.merging import Method, PerTask, merge_streamed, plan_streamed
from tests.merging import oracles
from tests.models_for_tests import LAYERS, random_models, small_models


def number_of_tasks(method: Method, wanted: int) -> int:
    """The number of tasks nearest to `wanted` that the method takes."""
    low, high = method.card.tasks
    return max(low, min(wanted, high or wanted))


def merge(method: Method, pretrained, finetuned, task: int = -1, **settings):
    """The merged params; for a task-conditioned method those of a task, by default the last."""
    oracle = oracles.of(method.name)
    extras = oracle.extras(pretrained, finetuned) if oracle.extras else None
    result = tv.merge(method, pretrained, finetuned, extras=extras, **settings)
    return result.params(task % len(finetuned)) if isinstance(result, PerTask) else result


def assert_close(a, b, atol=2e-6):
    """Same names, shapes, dtypes; values within `atol`."""
    a, b = trees.flatten(a), trees.flatten(b)
    assert list(a) == list(b)
    for path in a:
        assert a[path].shape == b[path].shape and a[path].dtype == b[path].dtype, path
        np.testing.assert_allclose(
            np.asarray(a[path], np.float64), np.asarray(b[path], np.float64), rtol=1e-5, atol=atol, err_msg=path
        )


def bf16_is_close_to_fp32(method: Method) -> None:
    """Names, shapes and dtypes stay; differences are taken in float32, so the only loss is rounding, 2^-8 relative."""
    pretrained, finetuned = small_models(0, number_of_tasks(method, 3), tau_size=1.0)
    to_bf16 = lambda p: jax.tree.map(lambda x: x.astype(jnp.bfloat16) if trees.is_float(x) else x, p)
    to_fp32 = lambda p: jax.tree.map(lambda x: x.astype(jnp.float32) if trees.is_float(x) else x, p)
    low = [to_bf16(p) for p in [pretrained, *finetuned]]
    merged = merge(method, low[0], low[1:])
    exact = merge(method, to_fp32(low[0]), [to_fp32(p) for p in low[1:]])
    assert_close(merged, jax.tree.map(lambda x, y: x.astype(y.dtype), exact, merged), atol=1e-6)


def zero_scale_gives_pretrained(method: Method) -> None:
    if "scale" not in method.defaults or method.name.startswith("lines"):  # LiNeS keeps alpha at the first block
        return
    pretrained, finetuned = random_models(1, number_of_tasks(method, 3))
    assert_close(merge(method, pretrained, finetuned, scale=0.0), pretrained)


def one_task_gives_expert(method: Method) -> None:
    settings = oracles.of(method.name).expert
    if settings is None or method.card.tasks[0] > 1:
        return
    pretrained, finetuned = small_models(2, 1)
    assert_close(merge(method, pretrained, finetuned, **settings), finetuned[0], atol=1e-5)


def identical_models_change_nothing(method: Method) -> None:
    pretrained, _ = random_models(3, 1)
    assert_close(merge(method, pretrained, [pretrained] * number_of_tasks(method, 3)), pretrained)


def order_of_tasks_does_not_matter(method: Method) -> None:
    if method.card.ordered:
        return
    pretrained, finetuned = random_models(4, number_of_tasks(method, 3))
    backwards = merge(method, pretrained, finetuned[::-1], task=0)
    assert_close(merge(method, pretrained, finetuned), backwards, atol=1e-5)


def twenty_tasks_work(method: Method) -> None:
    pretrained, finetuned = small_models(5, number_of_tasks(method, 20))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(merge(method, pretrained, finetuned)))


def stacked_layers_equal_single_ones(method: Method) -> None:
    pretrained, finetuned = random_models(6, number_of_tasks(method, 3))
    single = merge(method, trees.unstack_layers(pretrained), [trees.unstack_layers(f) for f in finetuned])
    assert_close(trees.unstack_layers(merge(method, pretrained, finetuned)), single)


def eager_and_jitted_runs_agree(method: Method) -> None:
    pretrained, finetuned = small_models(7, number_of_tasks(method, 3))
    tau = tv.task_vectors(pretrained, finetuned)
    oracle = oracles.of(method.name)
    extras = oracle.extras(pretrained, finetuned) if oracle.extras else None
    fn = lambda theta0, tau: tv.transform_task_vectors(method(), theta0, tau, extras=extras)
    assert_close(jax.jit(fn)(pretrained, tau), fn(pretrained, tau))


def sharded_equals_unsharded(method: Method) -> None:
    """Parameters cut over 8 devices along their last axis where it divides; the task axis is never cut."""
    pretrained, finetuned = small_models(8, number_of_tasks(method, 3))
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("model",), axis_types=auto, devices=jax.devices()[:8])

    def place(x):
        cut = x.ndim > 1 and x.shape[-1] % 8 == 0
        spec = jax.sharding.PartitionSpec(*[None] * (x.ndim - 1), "model") if cut else jax.sharding.PartitionSpec()
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    sharded = merge(method, jax.tree.map(place, pretrained), [jax.tree.map(place, f) for f in finetuned])
    assert_close(sharded, merge(method, pretrained, finetuned))


def streamed_equals_in_memory(method: Method, folder) -> None:
    """Through real files, tensor by tensor."""
    from taskvec.io import safetensors

    pretrained, finetuned = random_models(9, number_of_tasks(method, 3))
    models = [trees.unstack_layers(p) for p in [pretrained, *finetuned]]
    paths = [folder / f"{i}.safetensors" for i in range(len(models))]
    for path, model in zip(paths, models, strict=True):
        safetensors.save(path, {k: np.asarray(v) for k, v in trees.flatten(model).items()})
    readers = [safetensors.SafetensorsReader(path) for path in paths]
    oracle, chained = oracles.of(method.name), method()
    extras = oracle.extras(models[0], models[1:]) if oracle.extras else {}
    settings = {"extras": {name: _by_task(tree, len(finetuned)) for name, tree in extras.items()}}
    if all(stage.by_rows for stage in chained.stages):
        settings["memory"] = 8_000 * len(finetuned)  # too little for the larger tensors: they go by rows
        assert plan_streamed(method, readers[0], readers[1:], **settings).rows
    if method.card.result == "task-conditioned":
        settings["task"] = len(finetuned) - 1
    with safetensors.SafetensorsWriter(folder / "merged.safetensors", readers[0].specs) as writer:
        merge_streamed(method, readers[0], readers[1:], writer.write, **settings)
    merged = {k: jnp.asarray(v) for k, v in safetensors.load(folder / "merged.safetensors").items()}
    assert_close(trees.unflatten(merged), merge(method, models[0], models[1:]))


class ArrayReader:
    """A model in memory where one on disk is expected."""

    def __init__(self, arrays):
        self.arrays = self.specs = arrays

    def read(self, name, rows=None):
        return np.asarray(self.arrays[name] if rows is None else self.arrays[name][rows])


def _by_task(tree, tasks: int) -> list[ArrayReader]:
    return [ArrayReader({path: np.asarray(x[t]) for path, x in trees.flatten(tree).items()}) for t in range(tasks)]


def has_a_true_card(method: Method) -> None:
    card = method.card
    assert card.title and card.summary and card.arxiv.count(".") == 1 and 2000 < card.year < 2100
    assert method.build.__doc__ and all(v is not None or k == "weights" for k, v in method.defaults.items())


def behaves_as_its_card_says(method: Method) -> None:
    """What the card says of `base`, `tasks`, `extras`, `data` and `result`."""
    card, oracle, (low, high) = method.card, oracles.of(method.name), method.card.tasks
    pretrained, finetuned = small_models(8, number_of_tasks(method, 3))
    extras = oracle.extras(pretrained, finetuned) if oracle.extras else {}
    result = tv.merge(method, pretrained, finetuned, extras=extras)
    assert isinstance(result, PerTask) == (card.result == "task-conditioned") and not card.heads_trained
    assert result.num_tasks == len(finetuned) if isinstance(result, PerTask) else result.keys() == pretrained.keys()

    assert set(extras) == set(card.extras) and (card.extras or card.data == "none")
    for name in card.extras:
        with pytest.raises(ValueError, match=f"needs extras .*{name}"):
            tv.merge(method, pretrained, finetuned, extras={k: v for k, v in extras.items() if k != name})
    for count in (low - 1, high + 1 if high else 0):
        with pytest.raises(ValueError, match=r"takes .* fine-tuned models|at least one fine-tuned model"):
            tv.merge(method, pretrained, finetuned[:1] * count, extras=extras)

    if card.base == "required":
        with pytest.raises(ValueError, match="needs the pretrained model"):
            tv.merge(method, None, finetuned, extras=extras)
        return
    # Without a pretrained model a method works on the weights: as from zero, which the integers are not.
    without = tv.merge(method, None, finetuned, extras=extras)
    zeros = jax.tree.map(lambda x: 0 * x if trees.is_float(x) else x, finetuned[0])
    assert_close(without, tv.merge(method, zeros, finetuned, extras=extras))
    assert bool(jnp.isfinite(without["embeddings"]["table"]).all())


CHECKS = (
    bf16_is_close_to_fp32,
    zero_scale_gives_pretrained,
    one_task_gives_expert,
    identical_models_change_nothing,
    order_of_tasks_does_not_matter,
    twenty_tasks_work,
    stacked_layers_equal_single_ones,
    eager_and_jitted_runs_agree,
    sharded_equals_unsharded,
    has_a_true_card,
    behaves_as_its_card_says,
)

assert LAYERS > 1  # depth must mean something
