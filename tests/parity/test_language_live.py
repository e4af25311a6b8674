"""Language models live against transformers, where it is installed (extra `parity`): outputs, copies, searches."""

import pathlib
import sys

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from taskvec import models  # noqa: E402
from taskvec.models import decoding, relative  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import record_language as record  # noqa: E402

record.TINY["mistral_plain"] = transformers.MistralConfig(
    vocab_size=43, sliding_window=30, pad_token_id=0, head_dim=8, rope_parameters={"rope_theta": 99.0}, **record.DECODER
)
record.TINY["gpt2_untied"] = transformers.GPT2Config(
    vocab_size=43, n_positions=40, n_embd=18, n_layer=2, n_head=2, n_inner=20, activation_function="relu",
    tie_word_embeddings=False, scale_attn_weights=False, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
# Old T5 buckets, and a decoder as deep as the encoder.
record.TINY["t5_buckets"] = transformers.T5Config(
    vocab_size=31, d_model=16, d_kv=4, d_ff=20, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=3
)


def loaded(folder, kind):
    """What transformers makes of a folder."""
    auto = {"roberta": transformers.AutoModel, "t5": transformers.AutoModelForSeq2SeqLM}
    return auto.get(kind, transformers.AutoModelForCausalLM).from_pretrained(folder).eval()


def compare(mine, reference, mask, atol):
    for key, theirs in reference.items():
        keep = mask if key == "tokens" or (key == "logits" and theirs.shape[1] == mask.shape[1]) else ...
        np.testing.assert_allclose(np.asarray(mine[key])[keep], theirs[keep], atol=atol, err_msg=key)


@pytest.mark.parametrize("name", record.TINY)
def test_random_models_and_their_saved_copies(name, tmp_path):
    theirs = record.random_model(name, 11)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = models.load(tmp_path / "theirs")
    batch = record.make_batch(theirs.config, 12, 17)
    mine = jax.jit(model.apply)(params, batch)
    compare(mine, record.outputs(theirs, batch), batch["mask"], 1e-5)
    models.save(tmp_path / "copy", model, params, source=tmp_path / "theirs")
    models.save(tmp_path / "alone", model, params)
    for folder in ("copy", "alone"):
        copy = loaded(tmp_path / folder, theirs.config.model_type)
        compare(mine, record.outputs(copy, batch), batch["mask"], 1e-5)


@pytest.mark.parametrize("search", record.SEARCHES)
@pytest.mark.parametrize("name", [name for name in record.TINY if name != "roberta_tiny"])
def test_searches(name, search, tmp_path):
    theirs = record.random_model(name, 21).eval()
    theirs.save_pretrained(tmp_path)
    model, params = models.load(tmp_path)
    batch = record.make_batch(theirs.config, 22, 11)
    batch = {key: batch[key] for key in ("ids", "mask")}
    expected = record.generated(theirs, batch, 10, **record.SEARCHES[search])
    found = decoding.generate(model, params, batch, 10, pad=0, **record.SEARCHES[search])
    np.testing.assert_array_equal(np.where(found.mask, found.ids, -1), expected)


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("count", "longest"), [(32, 128), (8, 12), (6, 50), (64, 1000)])
def test_buckets_of_distances(count, longest, both_ways):
    from transformers.models.t5.modeling_t5 import T5Attention

    reach = longest + 40
    theirs = T5Attention._relative_position_bucket(torch.arange(-reach, reach + 1), both_ways, count, longest)
    table = np.arange(count, dtype=np.float32)[:, None]
    mine = relative.bias(jax.numpy.asarray(table), np.array([reach]), 2 * reach + 1, longest, both_ways=both_ways)
    np.testing.assert_array_equal(mine[0, 0, 0], theirs.numpy())


@pytest.mark.slow
def test_a_random_roberta_base(tmp_path):
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1
    )
    theirs = transformers.RobertaModel(config).eval()
    theirs.save_pretrained(tmp_path)
    batch = record.make_batch(config, 1, 128)
    model, params = models.load(tmp_path)
    compare(jax.jit(model.apply)(params, batch), record.outputs(theirs, batch), batch["mask"], 1e-4)
