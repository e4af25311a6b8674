"""Folders written by transformers, merged by the command line and opened by transformers again (extra `parity`)."""

import json
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from taskvec import cli  # noqa: E402
from taskvec.io import safetensors  # noqa: E402

TEXT = {"vocab_size": 101, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL = {**TEXT, "max_position_embeddings": 32}
CLIP = {
    "text_config": SMALL,
    "vision_config": {**{k: v for k, v in TEXT.items() if k != "vocab_size"}, "image_size": 16, "patch_size": 8},
    "projection_dim": 12,
}


def llama(**more):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2, **more))


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=101, n_embd=16, n_layer=3, n_head=4, n_positions=32)
    )


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=101, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    )


MODELS = {
    "llama": llama,
    "llama_tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "t5": t5,
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
    "bert_masked": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "clip": lambda: transformers.CLIPModel(transformers.CLIPConfig(**CLIP)),
}


def family(folder, make, dtype=torch.float32):
    """A base and two experts as folders; returns their state dicts."""
    torch.manual_seed(0)
    model = make().to(dtype)
    start = {name: x.detach().clone() for name, x in model.named_parameters()}
    states = {}
    for seed, who in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, x in model.named_parameters():
                x.copy_(start[name] + (0.05 * torch.randn_like(x) if seed else 0))
        states[who] = {name: x.detach().clone() for name, x in model.state_dict().items()}
        model.save_pretrained(folder / who, max_shard_size="20KB")
    return type(model), states


def merge(folder, *more):
    refs = ["--base", str(folder / "base"), "--expert", str(folder / "a"), "--expert", str(folder / "b")]
    assert cli.main(["merge", *refs, "--out", str(folder / "out"), "--debug", *more]) == 0


def opened(kind, folder):
    """What transformers makes of a folder, which must lack nothing and hold nothing else."""
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[what], (what, report[what])
    return model


def assert_mean(model, states, tolerance=1e-6):
    for name, x in model.state_dict().items():
        if x.dtype.is_floating_point:
            base, a, b = (states[who][name].float() for who in ("base", "a", "b"))
            wanted = base + 0.5 * (a - base) + 0.5 * (b - base)
            torch.testing.assert_close(x.float(), wanted, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_opens_the_result_and_it_is_the_mean(tmp_path, name):
    kind, states = family(tmp_path, MODELS[name])
    merge(tmp_path, "--method", "weight_average", "--shard-size", "20kB")
    assert_mean(opened(kind, tmp_path / "out"), states)
    stored = lambda who: safetensors.SafetensorsReader(tmp_path / who).specs
    assert stored("out") == stored("base")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("name", ["llama_tied", "t5", "bert_masked"])
def test_a_tied_copy_stored_in_the_file_stays_tied(tmp_path, name):
    """Files of older versions, and converted ones, hold both tensors."""
    kind, states = family(tmp_path, MODELS[name])
    for who in ("base", "a", "b"):
        tensors = safetensors.load(tmp_path / who)
        for path in (tmp_path / who).glob("model*"):
            path.unlink()
        safetensors.save(
            tmp_path / who, {k: np.asarray(v) for k, v in tensors.items()} | _duplicates(states[who], tensors)
        )
    merge(tmp_path, "--method", "dare", "--set", "density=0.5", "--set", "seed=3")
    model = opened(kind, tmp_path / "out")
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def _duplicates(state, tensors):
    return {name: x.numpy() for name, x in state.items() if name not in tensors and x.dtype.is_floating_point}


def test_one_expert_with_an_untied_head_unties_the_result(tmp_path):
    _, states = family(tmp_path, MODELS["llama_tied"])
    tensors = {k: np.asarray(v) for k, v in safetensors.load(tmp_path / "a").items()}
    head = tensors["model.embed_tokens.weight"] + np.float32(0.5)
    for path in (tmp_path / "a").glob("model*"):
        path.unlink()
    safetensors.save(tmp_path / "a", {**tensors, "lm_head.weight": head})
    merge(tmp_path, "--method", "weight_average")
    model = opened(transformers.LlamaForCausalLM, tmp_path / "out")
    states["a"]["lm_head.weight"] = torch.from_numpy(head)
    assert not model.config.tie_word_embeddings
    assert_mean(model, states)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_asked_for(tmp_path, dtype):
    kind, states = family(tmp_path, MODELS["clip"])
    merge(tmp_path, "--method", "weight_average", "--dtype", dtype)
    model = opened(kind, tmp_path / "out")
    assert model.dtype == getattr(torch, dtype)
    assert_mean(model, states, tolerance=1e-2)


def test_a_base_in_bfloat16_stays_so(tmp_path):
    kind, states = family(tmp_path, MODELS["llama"], torch.bfloat16)
    merge(tmp_path, "--method", "weight_average")
    model = opened(kind, tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert_mean(model, states, tolerance=1e-2)


def test_a_body_and_experts_with_heads(tmp_path):
    """The base has no prefix and no head; the experts have both."""
    _, states = family(tmp_path, lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)))
    body = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base").bert
    for path in (tmp_path / "base").iterdir():
        path.unlink()
    body.save_pretrained(tmp_path / "base")
    merge(tmp_path, "--method", "weight_average", "--include", "^(?!classifier)")
    model = opened(transformers.BertModel, tmp_path / "out")
    bare = {who: {k.removeprefix("bert."): v for k, v in state.items()} for who, state in states.items()}
    assert_mean(model, bare)


LORA = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6}),
    "rslora_patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "r": 4,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 3},
            "alpha_pattern": {"v_proj": 11},
            "use_rslora": True,
        },
    ),
    "fan_in_fan_out": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": True}),
    "whole_modules": ("llama", {"target_modules": ["q_proj"], "r": 2, "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"], "r": 3}),
    "convolution": ("clip", {"target_modules": ["patch_embedding", "q_proj"], "r": 3}),
}


@pytest.mark.parametrize("case", LORA)
def test_adapters_are_what_peft_merges_into_the_base(tmp_path, case):
    peft = pytest.importorskip("peft")
    name, settings = LORA[case]
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(tmp_path / "base")
    kind = type(MODELS[name]())
    states = {"base": kind.from_pretrained(tmp_path / "base").state_dict()}
    for seed, who in enumerate(("a", "b"), 1):
        torch.manual_seed(seed)
        model = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), peft.LoraConfig(**settings))
        with torch.no_grad():
            for x in model.parameters():
                if x.requires_grad:
                    x.add_(0.1 * torch.randn_like(x))
        model.save_pretrained(tmp_path / who)
        states[who] = model.merge_and_unload().state_dict()
        assert any((states[who][k] != x).any() for k, x in states["base"].items())
    merge(tmp_path, "--method", "weight_average", "--memory", "40kB")
    assert_mean(opened(kind, tmp_path / "out"), states)


def test_merged_factors_are_an_adapter_that_peft_loads(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    for seed, who in enumerate(("a", "b"), 1):
        torch.manual_seed(seed)
        model = peft.get_peft_model(
            transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), peft.LoraConfig(**LORA["plain"][1])
        )
        with torch.no_grad():
            for x in model.parameters():
                x.add_(0.1 * torch.randn_like(x) if x.requires_grad else 0)
        model.save_pretrained(tmp_path / who)
    refs = ["--expert", str(tmp_path / "a"), "--expert", str(tmp_path / "b"), "--out", str(tmp_path / "out")]
    assert cli.main(["merge", "--method", "weight_average", "--lora", "factor", *refs, "--debug"]) == 0
    merged = safetensors.load(tmp_path / "out" / "adapter_model.safetensors")
    a, b = (safetensors.load(tmp_path / who / "adapter_model.safetensors") for who in "ab")
    for key, x in merged.items():
        np.testing.assert_allclose(x, (a[key] + b[key]) / 2, atol=1e-7)
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    peft.PeftModel.from_pretrained(base, tmp_path / "out")
    assert json.loads(pathlib.Path(tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
