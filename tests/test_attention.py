"""Packed samples must not see each other, and generation must not notice that packing exists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from training.attention import (
    check_packable,
    has_varlen_kernel,
    register_varlen_attention,
    varlen_attention,
    varlen_mask,
)

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, as many key heads as query heads": ("llama", {"num_key_value_heads": 4}),
    "mistral with a window of 4": ("mistral", {"sliding_window": 4}),
    "gemma3 with local and global layers": (
        "gemma3_text",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3": ("qwen3", {}),
    "gpt2": ("gpt2", GPT2),
    "deepseek_v3, values narrower than keys": ("deepseek_v3", LATENT),
}
LENGTHS = [7, 1, 12, 5, 5]


@pytest.fixture(autouse=True, scope="module")
def varlen_is_registered() -> None:
    register_varlen_attention()


def build(model_type: str, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SMALL, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def samples(lengths: list[int] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (1, length), generator=generator) for length in lengths]


def pack(rows: list[torch.Tensor]) -> dict[str, Any]:
    lengths = [row.shape[1] for row in rows]
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.cat(rows, dim=1),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_gives_the_logits_and_gradients_of_its_samples_alone(family: str) -> None:
    model_type, changes = FAMILIES[family]
    model = build(model_type, **changes)
    alone = torch.cat([model(input_ids=row).logits for row in samples()], dim=1)
    alone.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()

    model.set_attn_implementation("varlen")
    packed = model(**pack(samples())).logits
    packed.square().sum().backward()

    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_packed_row_without_boundaries_would_have_leaked() -> None:
    model = build("llama", "varlen")
    row = pack(samples())
    inside = model(**row).logits
    across = model(input_ids=row["input_ids"], position_ids=row["position_ids"]).logits
    assert (inside - across).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "mistral with a window of 4", "gemma3 with local and global layers"])
def test_one_plain_row_is_attended_as_by_sdpa(family: str) -> None:
    model_type, changes = FAMILIES[family]
    rows = torch.cat(samples([20, 20]))
    expected = build(model_type, **changes)(input_ids=rows).logits
    torch.testing.assert_close(
        build(model_type, "varlen", **changes)(input_ids=rows).logits, expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize(
    "family", ["llama", "mistral with a window of 4", "gemma3 with local and global layers", "gpt2"]
)
def test_greedy_generation_equals_sdpa_alone_and_in_a_left_padded_batch(family: str, cache: str | None) -> None:
    model_type, changes = FAMILIES[family]
    model = build(model_type, **changes)
    prompts = samples([9, 4, 6])
    padded = torch.cat([torch.nn.functional.pad(prompt, (9 - prompt.shape[1], 0)) for prompt in prompts])
    batches = [
        {"input_ids": prompts[0], "attention_mask": torch.ones_like(prompts[0])},
        {"input_ids": padded, "attention_mask": (padded != 0).long()},
    ]
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "use_cache": cache is not None}
    if cache is not None:
        settings["cache_implementation"] = cache
        settings["disable_compile"] = True
    expected = [model.generate(**batch, **settings) for batch in batches]
    model.set_attn_implementation("varlen")
    for batch, tokens in zip(batches, expected, strict=True):
        assert model.generate(**batch, **settings).tolist() == tokens.tolist()


def test_gradient_checkpointing_changes_nothing() -> None:
    row = pack(samples())
    gradients = []
    for checkpointing in (False, True):
        model = build("llama", "varlen").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**row).logits.square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*gradients)


def test_no_mask_is_built_for_a_packed_or_plain_row_and_one_is_for_padding() -> None:
    sizes = {"batch_size": 1, "q_length": 8, "kv_length": 8}
    assert varlen_mask(**sizes) is None
    assert varlen_mask(**sizes, local_size=4, allow_is_causal_skip=False) is None
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    mask = varlen_mask(**sizes, attention_mask=padding)
    assert mask is not None
    assert mask[0, 0, 5].tolist() == [False, False, True, True, True, True, False, False]


def test_what_the_kernels_cannot_do_is_refused_by_name() -> None:
    heads = torch.randn(1, 2, 6, 8)
    boundaries = torch.tensor([0, 2, 6], dtype=torch.int32)
    call: dict[str, Any] = {"attention_mask": None, "cu_seq_lens_q": boundaries, "max_length_q": 4}
    module = torch.nn.Identity()
    for change, message in (
        ({"dropout": 0.1}, r"drops attention weights \(0.1\)"),
        ({"softcap": 50.0}, "caps its scores"),
        ({"s_aux": torch.zeros(2)}, "attention sinks"),
        ({"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)}, "a mask beside the boundaries"),
    ):
        with pytest.raises(ValueError, match=message):
            varlen_attention(module, heads, heads, heads, **{**call, **change})
    with pytest.raises(ValueError, match="one flat row, got a batch of 2"):
        varlen_attention(module, *[heads.expand(2, -1, -1, -1)] * 3, **call)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gemma2", {}, "attn_logit_softcapping"),
        ("bloom", {"n_head": 4}, "does not hand sample boundaries"),
        (
            "llama4_text",
            {"num_local_experts": 2, "layer_types": ["chunked_attention"] * 2},
            "layers of kind chunked_attention",
        ),
    ],
)
def test_models_that_would_mix_packed_samples_are_refused(
    model_type: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_packable(build(model_type, "varlen", **changes))


def test_common_models_can_be_packed() -> None:
    for model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "olmo2", "mixtral"):
        check_packable(build(model_type))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cuda_kernel_agrees_with_samples_alone_on_the_cpu(family: str) -> None:
    model_type, changes = FAMILIES[family]
    model = build(model_type, **changes)
    alone = torch.cat([model(input_ids=row).logits for row in samples()], dim=1)
    model.set_attn_implementation("varlen")
    model.to("cuda", torch.bfloat16)
    row = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in pack(samples()).items()}
    assert has_varlen_kernel(torch.empty(1, 4, 2, 8, device="cuda", dtype=torch.bfloat16))
    torch.testing.assert_close(model(**row).logits.float().cpu(), alone, rtol=0.05, atol=0.02)
