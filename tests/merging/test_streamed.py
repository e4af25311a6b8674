"""What a streamed merge says before it reads a tensor: memory, and extras that do not fit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec import tree as trees
from taskvec.merging import merge_streamed, plan_streamed
from taskvec.transforms.base import Measure, Transform
from tests.merging.battery import ArrayReader

W = "layer.0.dense.weight"


def models(count, shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [
        ArrayReader({k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}) for _ in range(count)
    ]


def test_memory_of_a_whole_matrix_counts_its_gram_matrices():
    base, *experts = models(4, {W: (8, 64), "scale": ()})
    extras = {"gram": models(3, {W: (64, 64)})}
    least = 4 * (3 * 64 * 64 + 64 * 64 + 5 * 8 * 64)  # the Gram matrices, their sum, the weights and the result
    assert plan_streamed("regmean", base, experts, extras=extras).peak_bytes >= least
    with pytest.raises(ValueError, match=f"{W} takes .* which this method needs whole"):
        plan_streamed("regmean", base, experts, extras=extras, memory=least - 1)


def test_memory_of_a_whole_matrix_counts_measures_of_the_model():
    """Here it is the measure that takes much, the application little."""

    def largest(x_TxOxI, leaf, stats):
        square_TxIxI = jnp.einsum("toi,toj->tij", x_TxOxI, x_TxOxI)
        return jnp.linalg.norm(square_TxIxI @ square_TxIxI, axis=(1, 2))

    small = Transform(
        "small", lambda x, leaf, stats: (x / stats[0][:, None, None]).sum(0), (Measure(largest),), (), False
    )
    base, *experts = models(3, {W: (2, 128)})
    assert plan_streamed(small, base, experts).peak_bytes >= 4 * 2 * 2 * 128 * 128  # two matrices per task


def test_what_is_compiled_to_plan_is_what_runs(caplog, monkeypatch):
    """The chain has a measure that is compiled, one that NumPy takes of what comes before it, and whole matrices."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # what jax logs is a setting of each thread
    base, *experts = models(3, {W: (6, 5)})
    chained = tv.chain(tv.norm_weighting(-1.0), tv.trim(0.5), tv.flatten_spectrum())
    compiled = lambda: sum(bool(re.match(r"Compiling jit\((applied|measured)", r.message)) for r in caplog.records)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        plan_streamed(chained, base, experts)
        assert compiled() == 3
        merge_streamed(chained, base, experts, lambda name, x, rows: None)
    assert compiled() == 3


def test_memory_counts_what_readers_hold():
    base, *experts = models(3, {W: (64, 16)})
    before = plan_streamed("weight_average", base, experts)
    base.held = experts[1].held = lambda name: 10_000
    after = plan_streamed("weight_average", base, experts)
    assert after.workers == 1 and after.peak_bytes == before.peak_bytes // before.workers + 20_000
    with pytest.raises(ValueError, match="and 0 MiB for what checkpoints give whole only"):
        plan_streamed("weight_average", base, experts, memory=19_999)


def test_blocks_do_not_depend_on_the_number_of_cores(monkeypatch):
    base, *experts = models(3, {W: (64, 16)})
    cut = []
    for cores in (1, 2, 64):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        cut.append(plan_streamed("weight_average", base, experts, memory=40_000).rows)
    assert cut[0] == cut[1] == cut[2] and 0 < cut[0][W] < 64


def test_stacked_layers_are_not_cut():
    path = f"{trees.STACK}/w"
    base, *experts = models(3, {path: (2, 6, 4), "head": (30, 4)})
    found = {path: np.zeros((2, 6, 4), np.float32), "head": np.zeros((30, 4), np.float32)}

    def write(name, x, rows):
        found[name][rows or slice(None)] = x

    merge_streamed("weight_average", base, experts, write, memory=4_000)
    for name, x in found.items():
        np.testing.assert_allclose(x, (experts[0].arrays[name] + experts[1].arrays[name]) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "extras", "message"),
    [
        ("regmean", {"gram": [{W: (5, 5)}] * 2}, f"{W}: a Gram matrix of shape .2, 5, 5. for 2 matrices with 4 inputs"),
        (
            "regmean",
            {"gram": [{W: (4, 4)}, {W: (5, 5)}]},
            "differs between models 0 and 1 .*float32.4, 4. and float32.5, 5.",
        ),
        ("regmean", {"gram": [{W: (4, 4)}, {}]}, "differs between models 0 and 1 .* and absent"),
        ("regmean", {"gram": [{"dense": (4, 4)}] * 2}, "holds dense, which is no tensor of the model"),
        ("regmean", {"gram": [{W: (4, 4)}] * 3}, "is needed once for each of the 2 models"),
        ("fisher", {"fisher": [{W: (4,)}] * 2}, f"{W}: Fisher information of shape .2, 4. for weights .2, 6, 4."),
        ("copa", {"lora_a": [{W: (2, 4)}] * 2, "lora_b": [{W: (6, 3)}] * 2}, f"{W}: LoRA factors"),
        ("copa", {"lora_a": [{W: (2, 4)}] * 2, "lora_b": [{"bias": (6,)}] * 2}, "but not all of the extras"),
        ("ties", {"gram": [{W: (4, 4)}] * 2}, "ties has no use for extras .'gram'.; it takes none"),
    ],
)
def test_extras_that_do_not_fit(method, extras, message):
    base, *experts = models(3, {W: (6, 4), "bias": (6,)})
    readers = {name: [models(1, shapes)[0] for shapes in each] for name, each in extras.items()}
    for reader in (base, *experts, *(reader for each in readers.values() for reader in each)):
        reader.read = None
    with pytest.raises(ValueError, match=message):
        plan_streamed(method, base, experts, extras=readers)


def test_an_extra_that_is_not_finite_is_named():
    base, *experts = models(3, {W: (6, 4)})
    grams = models(2, {W: (4, 4)})
    grams[1].arrays[W][1, 2] = np.nan
    with pytest.raises(ValueError, match=f"extra 'gram' of model 1: {W} holds NaN"):
        merge_streamed("regmean", base, experts, None, extras={"gram": grams})
