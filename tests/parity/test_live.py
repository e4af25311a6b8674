"""Live comparison with transformers, where it is installed (extra `parity`); elsewhere recorded numbers serve."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from taskvec import models  # noqa: E402


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_a_random_bert_and_its_saved_copy(tmp_path, heads):
    torch.manual_seed(heads)
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 50}
    theirs = transformers.BertModel(
        transformers.BertConfig(**sizes, num_attention_heads=heads, max_position_embeddings=30)
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ids = np.random.default_rng(heads).integers(0, 61, (4, 13)).astype(np.int32)
    mask = np.arange(13) < np.array([[13], [1], [7], [12]])
    model, params = models.load(tmp_path / "theirs")
    mine = np.asarray(model.apply(params, {"ids": ids, "mask": mask})["tokens"])
    models.save(tmp_path / "mine", model, params, source=tmp_path / "theirs")
    for folder in ("theirs", "mine"):
        with torch.no_grad():
            reference = transformers.AutoModel.from_pretrained(tmp_path / folder).eval()
            out = reference(input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long())
        np.testing.assert_allclose(mine[mask], out.last_hidden_state.numpy()[mask], atol=1e-5)
