"""Statistics from data: Gram matrices and Fisher information against NumPy by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec import tree as trees
from taskvec.merging.collect import collect_fisher, collect_gram, collect_gram_plusplus, stack_tasks
from taskvec.models import bert
from taskvec.transforms.matrices import input_first, is_linear

CONFIG = bert.Config(
    vocab_size=23,
    hidden_size=8,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=9,
)


def bert_params(seed):
    rng = np.random.default_rng(seed)
    draw = lambda spec: jnp.asarray(rng.standard_normal(spec.shape) * 0.5, jnp.float32)
    return jax.tree.map(draw, bert.make(CONFIG).abstract)


def bert_batches(seed, sizes=(4, 4, 2)):
    rng = np.random.default_rng(seed)
    for size in sizes:
        lengths = rng.integers(2, 6, size)
        yield {"ids": rng.integers(0, 23, (size, 6)), "mask": np.arange(6)[None] < lengths[:, None]}


def bert_inputs(params, batch):
    """Every dense layer's inputs ``{name: [L][B, N, in]}`` of a BERT encoder, in float64 NumPy."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    table, found = p["embeddings"], {}

    def norm(w, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * w["scale"] + w["bias"]

    def dense(name, w, x):
        found.setdefault(name, []).append(x)
        return x @ w["kernel"] + w["bias"]

    x = table["word"][batch["ids"]] + table["position"][: batch["ids"].shape[1]] + table["token_type"][0]
    x = norm(table["norm"], x)
    for i in range(3):
        block = jax.tree.map(lambda w: w[i], p["blocks"])  # noqa: B023
        q, k, v = (dense(f"attention/{n}", block["attention"][n], x) for n in ("query", "key", "value"))
        out = np.zeros_like(x)
        for head in (slice(0, 4), slice(4, 8)):
            scores = q[..., head] @ np.swapaxes(k[..., head], 1, 2) / 2 - 1e9 * ~batch["mask"][:, None, :]
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[..., head] = weights / weights.sum(-1, keepdims=True) @ v[..., head]
        x = norm(block["attention"]["norm"], x + dense("attention/output", block["attention"]["output"], out))
        h = dense("mlp/up", block["mlp"]["up"], x)
        h = 0.5 * h * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        x = norm(block["mlp"]["norm"], x + dense("mlp/down", block["mlp"]["down"], h))
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_gram_of_bert(masked):
    params, batches = bert_params(0), list(bert_batches(1))
    model = bert.make(CONFIG)
    grams = trees.flatten(collect_gram(model.apply, params, batches, mask_of=_mask if masked else None))
    assert len(grams) == 6 and all(path.endswith("kernel") for path in grams)
    inputs = [bert_inputs(params, batch) for batch in batches]
    for path, gram in grams.items():
        name = path.removeprefix("blocks/").removesuffix("/kernel")
        for layer in range(3):
            rows = [
                each[name][layer][batch["mask"] if masked else slice(None)].reshape(-1, gram.shape[-1])
                for each, batch in zip(inputs, batches, strict=True)
            ]
            x = np.concatenate(rows)
            np.testing.assert_allclose(gram[layer], x.T @ x / len(x), rtol=2e-5, atol=1e-5, err_msg=path)


def _mask(batch):
    return batch["mask"]


def test_gram_of_a_plain_function():
    """Layers in a loop, both orientations, a matrix used twice, `jit`, `checkpoint`, a stack sliced by hand."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    params = {
        "first": {"kernel": jnp.round(normal(5, 4) * 8) / 8},
        "torch.weight": normal(4, 4),
        "blocks": {"a": {"kernel": normal(2, 4, 4)}},
        "blocks_of_mine": [{"kernel": normal(4, 4)}, {"kernel": normal(4, 4)}],
        "unused": {"kernel": normal(4, 4)},
        "ids": jnp.arange(4),
    }

    def apply_fn(params, batch):
        x = jnp.tanh(batch["x"] @ params["first"]["kernel"].astype(jnp.float16).astype(jnp.float32))
        x = x @ params["torch.weight"].T
        x = jax.checkpoint(lambda x: jnp.tanh(x) @ params["torch.weight"].T)(x)
        for layer in params["blocks_of_mine"]:
            x = jax.jit(lambda x, w: jax.nn.relu(x @ w))(x, layer["kernel"])
        x = jax.vmap(lambda x: x @ params["blocks"]["a"]["kernel"][0])(x)
        x = jnp.einsum("bnj,ji->nbi", x, params["blocks"]["a"]["kernel"][1])
        return x + params["unused"]["kernel"].sum()

    batches = [{"x": rng.standard_normal((3, 2, 5)).astype(np.float32)} for _ in range(2)]
    listed = dict(params, blocks_of_mine={f"layer_{i}": x for i, x in enumerate(params["blocks_of_mine"])})
    by_list = lambda p, b: apply_fn(dict(p, blocks_of_mine=[p["blocks_of_mine"][f"layer_{i}"] for i in range(2)]), b)
    grams = trees.flatten(collect_gram(by_list, listed, batches))
    expected = {}

    def add(name, x):
        expected.setdefault(name, []).append(np.asarray(x, np.float64).reshape(-1, x.shape[-1]))
        return np.asarray(x, np.float64)

    w = {k: np.asarray(v, np.float64) for k, v in trees.flatten(listed).items()}
    for batch in batches:
        x = np.tanh(add("first/kernel", batch["x"]) @ w["first/kernel"])
        x = add("torch.weight", x) @ w["torch.weight"].T
        x = add("torch.weight", np.tanh(x)) @ w["torch.weight"].T
        for i in range(2):
            x = np.maximum(add(f"blocks_of_mine/layer_{i}/kernel", x) @ w[f"blocks_of_mine/layer_{i}/kernel"], 0)
        for i in range(2):
            x = add(f"blocks/a/kernel#{i}", x) @ w["blocks/a/kernel"][i]
    assert sorted(grams) == sorted({key.split("#")[0] for key in expected})
    for name, rows in expected.items():
        path, _, layer = name.partition("#")
        gram = grams[path][int(layer)] if layer else grams[path]
        x = np.concatenate(rows)
        np.testing.assert_allclose(gram, x.T @ x / len(x), rtol=1e-4, atol=1e-4, err_msg=name)


def test_gram_errors():
    params, batch = {"a": {"kernel": jnp.eye(3)}, "b": {"weight": jnp.eye(3)}}, [np.ones((2, 3), np.float32)]
    with pytest.raises(ValueError, match="at least one batch"):
        collect_gram(lambda p, x: x, params, [])
    with pytest.raises(ValueError, match="no product with any weight matrix"):
        collect_gram(lambda p, x: x, params, batch)
    with pytest.raises(ValueError, match=r"no product with \['b/weight'\]"):
        collect_gram(lambda p, x: x @ p["a"]["kernel"], params, batch, include="b/")
    with pytest.raises(ValueError, match=r"b/weight is used as \[in, out\]"):
        collect_gram(lambda p, x: x @ p["b"]["weight"], params, batch)


def test_names_say_the_orientation():
    assert input_first("blocks/0/mlp/up/kernel", (3, 4)) and not input_first("encoder.layer.0.output.weight", (3, 4))
    assert input_first("transformer.h.3.attn.c_attn.weight", (3, 9))
    assert not input_first("visual.transformer.resblocks.3.mlp.c_fc.weight", (9, 3))
    assert is_linear("h.0.mlp.c_fc.weight", (3, 4)) and not is_linear("embeddings.word_embeddings.weight", (30, 4))
    assert not is_linear("wte.weight", (3, 4)) and not is_linear("shared.weight", (3, 4))


def test_regmean_keeps_the_outputs_of_a_linear_model():
    """Tasks whose inputs span different directions: all outputs can be kept, and RegMean keeps them."""
    rng = np.random.default_rng(0)
    bases = np.split(np.linalg.qr(rng.standard_normal((9, 9)))[0], 3)
    inputs = [(rng.standard_normal((50, 3)) @ basis).astype(np.float32) for basis in bases]
    apply_fn = lambda p, x: x @ p["kernel"]
    models = [{"kernel": jnp.asarray(rng.standard_normal((9, 4)), jnp.float32)} for _ in range(3)]
    grams = [collect_gram(apply_fn, p, np.split(x, 5)) for p, x in zip(models, inputs, strict=True)]
    extras = {"gram": stack_tasks(grams)}
    merged = tv.merge("regmean", None, models, extras=extras, reduce_nondiagonal=1.0)
    for p, x in zip(models, inputs, strict=True):
        np.testing.assert_allclose(apply_fn(merged, x), apply_fn(p, x), atol=1e-3)
    assert (
        np.abs(apply_fn(tv.merge("weight_average", None, models), inputs[0]) - inputs[0] @ models[0]["kernel"]).max()
        > 1
    )


@pytest.mark.parametrize("stacked", [True, False])
def test_regmean_plusplus_is_sequential(stacked):
    """Against the layers merged one after the other by hand."""
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape) * 0.5, jnp.float32)
    models = [{"blocks": {"kernel": normal(3, 4, 4)}, "stem": {"kernel": normal(5, 4)}} for _ in range(2)]
    inputs = [rng.standard_normal((30, 5)).astype(np.float32) for _ in range(2)]

    def apply_fn(p, x):
        x = jnp.tanh(x @ p["stem"]["kernel"])
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["blocks"]["kernel"])[0]

    fn = apply_fn if stacked else lambda p, x: apply_fn(trees.stack_layers(p), x)
    if stacked:
        given = models
    else:
        given = [trees.unstack_layers(p) for p in models]
        fn = lambda p, x: _by_layers(p, x)
    gram = collect_gram_plusplus(fn, None, given, [lambda x=x: np.split(x, 3) for x in inputs])
    merged = trees.unstack_layers(tv.merge("regmean_plusplus", None, given, extras={"gram": gram}))
    stem = np.mean([np.asarray(p["stem"]["kernel"], np.float64) for p in models], 0)
    np.testing.assert_allclose(merged["stem"]["kernel"], stem, atol=1e-6)
    xs = [np.tanh(x.astype(np.float64) @ stem) for x in inputs]
    for layer in range(3):
        left = right = 0
        for x, p in zip(xs, models, strict=True):
            g = 0.95 * x.T @ x / len(x) + 0.05 * np.diag(np.diag(x.T @ x / len(x)))
            left, right = left + g, right + g @ np.asarray(p["blocks"]["kernel"][layer], np.float64)
        w = np.linalg.solve(left, right)
        np.testing.assert_allclose(merged["blocks"][str(layer)]["kernel"], w, atol=2e-4)
        xs = [np.tanh(x @ w) for x in xs]


def _by_layers(p, x):
    x = jnp.tanh(x @ p["stem"]["kernel"])
    for i in range(3):
        x = jnp.tanh(x @ p["blocks"][str(i)]["kernel"])
    return x


def classifier(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "kernel": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32),
        "bias": jnp.asarray(rng.standard_normal(3), jnp.float32),
        "steps": jnp.int32(7),
    }
    return params, rng.standard_normal((10, 4)).astype(np.float32)


def log_probs_fn(params, x):
    return jax.nn.log_softmax(x @ params["kernel"] + params["bias"])


def fisher_by_hand(params, x):
    """Of a softmax regression: ``d log p_y / d logits = e_y - p``."""
    w, b = (np.asarray(params[k], np.float64) for k in ("kernel", "bias"))
    logits = x.astype(np.float64) @ w + b
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    kernel, bias = np.zeros_like(w), np.zeros_like(b)
    for x_i, p_i in zip(x, p, strict=True):
        for y in range(3):
            g = np.eye(3)[y] - p_i
            bias += p_i[y] * g**2 / len(x)
            kernel += p_i[y] * np.outer(x_i, g) ** 2 / len(x)
    return {"kernel": kernel, "bias": bias}


@pytest.mark.parametrize("chunk", [1, 3])
def test_exact_fisher(chunk):
    params, x = classifier()
    found = collect_fisher(log_probs_fn, params, [x[:4], x[4:8], x[8:]], chunk=chunk)
    expected = fisher_by_hand(params, x)
    assert found.keys() == expected.keys()  # no integers
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-7)


def test_sampled_fisher_approaches_the_exact_one():
    params, x = classifier()
    settings = {"estimator": "sampled", "samples": 3000}
    found = collect_fisher(log_probs_fn, params, [x], **settings)
    for name, value in fisher_by_hand(params, x).items():
        np.testing.assert_allclose(found[name], value, rtol=0.05)
    again = collect_fisher(log_probs_fn, params, [x], **settings)
    other = collect_fisher(log_probs_fn, params, [x], **settings, seed=1)
    np.testing.assert_array_equal(found["kernel"], again["kernel"])
    assert np.abs(found["kernel"] - other["kernel"]).max() > 0


def test_fisher_of_whole_batches():
    """``(sum_x sum_y sqrt(p) d log p)^2`` a batch, over the number of examples."""
    params, x = classifier()
    found = collect_fisher(log_probs_fn, params, [x[:6], x[6:]], estimator="batch")
    w, b = (np.asarray(params[k], np.float64) for k in ("kernel", "bias"))
    expected = 0
    for part in (x[:6], x[6:]):
        logits = part.astype(np.float64) @ w + b
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        g = sum(np.sqrt(p[:, [y]]) * (np.eye(3)[y] - p) for y in range(3))
        expected = expected + (part.T @ g) ** 2 / len(x)
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-4)


def test_fisher_of_a_scanned_model():
    """Runs through a scan of stacked layers; the sum over labels of p d log p is zero, its square is not."""
    params, batch = bert_params(0), next(iter(bert_batches(1)))
    head = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)), jnp.float32)
    apply_fn = bert.make(CONFIG).apply
    found = collect_fisher(lambda p, b: jax.nn.log_softmax(apply_fn(p, b)["features"] @ head), params, [batch])
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert all(bool((x >= 0).all()) and bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))
    merged = tv.merge("fisher", params, [params, bert_params(2)], extras={"fisher": stack_tasks([found, found])})
    assert jax.tree.structure(merged) == jax.tree.structure(params)
