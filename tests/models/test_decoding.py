"""Greedy and beam search find what transformers' `generate` found (tests/parity/record_language.py)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec import models
from taskvec.models import decoding
from taskvec.models.base import Steps

RECORDED = pathlib.Path(__file__).parent / "recorded"
SEARCHES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "long": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    "early": {"num_beams": 2, "length_penalty": 0.5, "early_stopping": True},
}


def load(name):
    with np.load(RECORDED / name / "outputs.npz") as file:
        out = dict(file)
    return *models.load(RECORDED / name), {key: out[key] for key in ("ids", "mask")}, out


@pytest.mark.parametrize(
    ("name", "search"),
    [
        ("gpt2_tiny", "early"), ("gpt2_tiny", "long"), ("llama_scaled", "beam"), ("t5_gated", "greedy"),
        ("t5_gated", "beam"), ("t5_relu", "early"),
    ],
)  # fmt: skip
def test_what_is_found_equals_transformers(name, search):
    model, params, batch, out = load(name)
    found = decoding.generate(model, params, batch, out[search].shape[1], **SEARCHES[search])
    np.testing.assert_array_equal(np.where(found.mask, found.ids, -1), out[search])
    assert (np.asarray(found.ids)[~found.mask] == model.config.pad_token_id).all()


def test_greedy_search_compiles_once_and_takes_prompts_padded_at_either_side():
    model, params, batch, out = load("gpt2_tiny")
    traced = []

    def start(*args, **how):
        traced.append("start")
        return model.steps.start(*args, **how)

    counted = model._replace(steps=Steps(start, model.steps.step))
    order = np.argsort(batch["mask"], axis=1, kind="stable")
    left = {key: np.take_along_axis(x, order, 1) for key, x in batch.items()}
    right, left = (decoding.generate(counted, params, b, out["greedy"].shape[1]) for b in (batch, left))
    assert traced == ["start"]
    for found in (right, left):
        np.testing.assert_array_equal(np.where(found.mask, found.ids, -1), out["greedy"])
    # The score is the mean log probability that the model itself gives to the new tokens of a text.
    row, length = 0, batch["mask"][0].sum()
    new = np.asarray(right.ids[row])[np.asarray(right.mask[row])]
    whole = jnp.asarray(np.concatenate([batch["ids"][row, :length], new]))[None]
    logits = model.apply(params, {"ids": whole, "mask": jnp.ones(whole.shape, bool)})["logits"][0, length - 1 : -1]
    mean = jax.nn.log_softmax(logits)[np.arange(len(new)), new].mean()
    np.testing.assert_allclose(right.score[row], mean, atol=1e-5)


def test_other_models_generate_too():
    """A chain that goes from every token to the next, and ends at 4; the state carries the last token."""

    def start(params, batch, room):
        return params[batch["ids"][:, -1]], models.base.State({}, {"last": batch["ids"][:, -1]}, {}, jnp.int32(0))

    def step(params, ids, state):
        return params[ids], state._replace(rows={"last": ids})

    table = jnp.eye(6).at[jnp.arange(6), (jnp.arange(6) + 1) % 6].set(9.0)
    base, *_ = load("gpt2_tiny")
    model = base._replace(steps=Steps(lambda *a, **_: start(*a), lambda *a, **_: step(*a)))
    batch = {"ids": jnp.array([[0], [2], [4]])}
    for beams in (1, 2):
        found = decoding.generate(model, table, batch, 5, beams, eos=4, pad=5)
        np.testing.assert_array_equal(found.ids, [[1, 2, 3, 4, 5], [3, 4, 5, 5, 5], [5, 0, 1, 2, 3]])
        np.testing.assert_array_equal(found.mask.sum(1), [4, 2, 5])


def test_what_cannot_be_generated():
    model, params, batch, _ = load("gpt2_tiny")
    with pytest.raises(ValueError, match="num_beams 0 must be 1 or more"):
        decoding.generate(model, params, batch, 4, num_beams=0)
    with pytest.raises(ValueError, match="texts of 48 tokens, but the model has 40 positions"):
        decoding.generate(model, params, batch, 30)
    with pytest.raises(ValueError, match="early_stopping 'soon' is not one of"):
        decoding.generate(model, params, batch, 4, early_stopping="soon")
    with pytest.raises(ValueError, match="bert generates no text"):
        decoding.generate(models.load(RECORDED / "bert_odd")[0], params, batch, 4)
