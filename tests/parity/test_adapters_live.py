"""Adapters that we write, as peft reads and merges them; runs where torch, transformers and peft are installed."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec import models
from taskvec.io import names, peft
from taskvec.training import lora

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("peft")

RECORDED = pathlib.Path(__file__).parents[1] / "models" / "recorded"
CLASSES = {
    "clip_tower": "CLIPVisionModel",
    "bert_even": "BertModel",
    "gpt2_tiny": "GPT2LMHeadModel",
    "llama_scaled": "LlamaForCausalLM",
    "t5_gated": "T5ForConditionalGeneration",
}


@pytest.mark.parametrize("name", CLASSES)
def test_peft_merges_to_our_weights(tmp_path, name):
    folder = RECORDED / name
    model, params = models.load(folder)
    how = lora.lora(2, 6.0, r"(attention|mlp)/\w+/kernel$")
    learnables, fixed = how.init(params)
    rng = np.random.default_rng(0)
    learnables = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), learnables)
    peft.save_adapter(tmp_path, model.table, lora.factors(learnables, fixed), 6.0, base=folder)
    loaded = getattr(transformers, CLASSES[name]).from_pretrained(folder, dtype=torch.float32)
    merged = theirs.PeftModel.from_pretrained(loaded, tmp_path).merge_and_unload().state_dict()
    ours = names.to_names(model.table, how.weights(learnables, fixed))
    start = names.to_names(model.table, params)
    # transformers calls some tensors otherwise in memory than in files: compare the changed ones by their ends.
    changed = [key for key, x in ours.items() if not np.array_equal(x, start[key])]
    assert changed
    for key in changed:
        (match,) = [k for k in merged if k.endswith(key) or key.endswith(k)]
        np.testing.assert_allclose(merged[match].numpy(), ours[key], atol=1e-5, err_msg=key)
