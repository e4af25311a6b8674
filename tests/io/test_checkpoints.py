"""Resumable state: bit-identical, the latest ones kept, a broken save ignored, another configuration refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from taskvec.io.checkpoints import Checkpoint


def state(seed):
    key = jax.random.key(seed)
    learnables = {"coefficients": jax.random.normal(key, (3, 4)), "head": {"bias": jnp.ones(2, jnp.bfloat16)}}
    return {"learnables": learnables, "optimiser": optax.adam(1e-3).init(learnables), "seen": np.int32([7])}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_round_trip_keeps_bits_structure_and_the_latest(tmp_path):
    with Checkpoint(tmp_path / "run", every=2) as checkpoint:
        assert checkpoint.restore(state(0)) is None
        for step in (2, 4, 6):
            checkpoint.save(step, state(step))
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.name.isdigit()) == ["4", "6"]
    with Checkpoint(tmp_path / "run", every=2) as checkpoint:
        step, restored = checkpoint.restore(jax.eval_shape(lambda: state(0)))
        assert step == 6
        assert_same(restored, state(6))
        assert not checkpoint.should_save(7)
        assert checkpoint.should_save(8)


def test_should_save_counts_from_the_last_save(tmp_path):
    with Checkpoint(tmp_path, every=10) as checkpoint:
        assert [s for s in (4, 8, 12, 16, 20) if checkpoint.should_save(s)] == [12, 16, 20]
        checkpoint.save(12, state(0))
        assert [s for s in (16, 20, 24) if checkpoint.should_save(s)] == [20, 24]


def test_a_save_cut_short_leaves_the_previous_one(tmp_path):
    with Checkpoint(tmp_path, every=1) as checkpoint:
        checkpoint.save(1, state(1))
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"  # the name under which orbax writes before its rename
    (unfinished / "state").mkdir(parents=True)
    (unfinished / "state" / "manifest.ocdbt").write_bytes(b"half")
    with Checkpoint(tmp_path, every=1) as checkpoint:
        step, restored = checkpoint.restore(state(0))
    assert step == 1
    assert_same(restored, state(1))


def test_another_configuration_is_refused(tmp_path):
    with Checkpoint(tmp_path, every=1) as checkpoint:
        checkpoint.save(1, {"coefficients": jnp.ones((2, 3))})
        with pytest.raises(ValueError, match=r"coefficients: float32\[2, 3\] saved, float32\[2, 4\] wanted"):
            checkpoint.restore({"coefficients": jnp.ones((2, 4))})
        with pytest.raises(ValueError, match="rank: absent saved"):
            checkpoint.restore({"coefficients": jnp.ones((2, 3)), "rank": jnp.ones(1)})


def test_another_run_is_refused_and_one_that_names_nothing_goes_on(tmp_path):
    mine, other = {"method": "a", "rate": "0.1"}, {"method": "b", "rate": "0.1", "seed": "0"}
    ones = {"coefficients": jnp.ones(2)}
    with Checkpoint(tmp_path, every=1) as checkpoint:
        checkpoint.of(mine).save(1, ones)
        checkpoint.of(mine).part("first").save(1, ones)
        assert checkpoint.of(mine).restore(ones)[0] == checkpoint.of(mine).part("first").restore(ones)[0] == 1
        with pytest.raises(ValueError, match=r"method: a saved, b wanted, seed: absent .*empty directory"):
            checkpoint.of(other)
        for run in (lambda: checkpoint.restore(ones), lambda: checkpoint.part("first").restore(ones)):
            with pytest.raises(ValueError, match="method: a saved, absent wanted"):
                run()
        assert checkpoint.part("first").of(mine).restore(ones)[0] == 1
        checkpoint.part("plain").save(3, ones)
        assert checkpoint.part("plain").restore(ones)[0] == 3


@pytest.mark.parametrize("leaf", [3, jax.random.key(0)])
def test_only_arrays_are_saved(tmp_path, leaf):
    with Checkpoint(tmp_path, every=1) as checkpoint, pytest.raises(TypeError, match="only arrays"):
        checkpoint.save(1, {"a": leaf})


def test_nonsense_settings(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoint(tmp_path, every=0)
