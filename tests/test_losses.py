"""The chunked loss is the ordinary cross entropy, with the ordinary gradients, and never holds all logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from training.attention import register_varlen_attention
from training.chunks import CHUNK_ELEMENTS, tokens_per_chunk
from training.losses import LogitShape, linear_cross_entropy, use_chunked_loss

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, head tied to the embedding": ("llama", {"tie_word_embeddings": True}),
    "phi, head with a bias": ("phi", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gemma2, capped logits": ("gemma2", {"final_logit_softcapping": 2.0}),
    "cohere, scaled logits": ("cohere", {"logit_scale": 0.25}),
    "granite, divided logits": ("granite", {"logits_scaling": 8.0}),
    "mixtral, experts": ("mixtral", {"num_local_experts": 4}),
    "gpt2": ("gpt2", GPT2),
    "opt": ("opt", OPT),
    "gpt_neox": ("gpt_neox", {}),
}


def build(model_type: str = "llama", attention: str | None = None, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SMALL, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def rows(num_rows: int = 2, num_tokens: int = 11, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 97, (num_rows, num_tokens), generator=generator)
    labels = input_ids.clone()
    labels[:, :4] = -100
    return {"input_ids": input_ids, "labels": labels}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        scale = right[name].abs().max().item()
        torch.testing.assert_close(
            gradient, right[name], rtol=1e-5, atol=2e-6 * scale + 1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


# ------------------------------------------------------------------------------------------------ the loss by itself


def head_inputs(
    dtype: torch.dtype, num_tokens: int = 23, hidden: int = 16, vocabulary: int = 101
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    leaves = [torch.randn(num_tokens, hidden), torch.randn(vocabulary, hidden) / 4, torch.randn(vocabulary)]
    return [leaf.to(dtype).requires_grad_() for leaf in leaves] + [torch.randint(vocabulary, (num_tokens,))]


SHAPES = [LogitShape(), LogitShape(scale=0.3), LogitShape(softcap=2.0), LogitShape(scale=1.7, softcap=3.0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 23, 1000])
def test_loss_and_gradients_equal_the_naive_ones_to_a_millionth(chunk_tokens: int, shape: LogitShape) -> None:
    hidden, weight, bias, targets = head_inputs(torch.float32)
    logits = linear(hidden, weight, bias) * shape.scale
    if shape.softcap is not None:
        logits = torch.tanh(logits / shape.softcap) * shape.softcap
    expected = cross_entropy(logits, targets, reduction="sum")
    expected_gradients = torch.autograd.grad(expected, (hidden, weight, bias))

    loss = linear_cross_entropy(hidden, weight, targets, bias, shape, chunk_tokens)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for gradient, reference in zip(torch.autograd.grad(loss, (hidden, weight, bias)), expected_gradients, strict=True):
        assert (gradient - reference).norm() <= 1e-6 * reference.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_hold_against_finite_differences(shape: LogitShape) -> None:
    hidden, weight, bias, targets = head_inputs(torch.float64, num_tokens=5, hidden=4, vocabulary=7)
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, targets, bias, shape, chunk_tokens=2) / 5,
        (hidden, weight, bias),
    )


def test_bfloat16_is_reduced_in_float32() -> None:
    hidden, weight, bias, targets = head_inputs(torch.bfloat16, num_tokens=999, vocabulary=1001)
    logits = linear(hidden, weight, bias)
    expected = cross_entropy(logits.double(), targets, reduction="sum")
    loss = linear_cross_entropy(hidden, weight, targets, bias, chunk_tokens=10)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    # Summed over 100 chunks in bfloat16, the gradient of the head would be off by several per cent.
    exact = torch.autograd.grad(expected, weight)[0]
    ours = torch.autograd.grad(loss, weight)[0]
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact.double()).norm() < 0.01 * exact.double().norm()


def test_autocast_multiplies_in_bfloat16_and_returns_float32_gradients() -> None:
    hidden, weight, bias, targets = head_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = cross_entropy(linear(hidden, weight, bias).float(), targets, reduction="sum")
        loss = linear_cross_entropy(hidden, weight, targets, bias, chunk_tokens=7)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, naive in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert ours.dtype == torch.float32
        assert (ours - naive).norm() < 0.01 * naive.norm()


def test_a_frozen_head_costs_no_gradient_and_no_grad_needs_none() -> None:
    hidden, weight, _, targets = head_inputs(torch.float32)
    loss = linear_cross_entropy(hidden, weight.detach(), targets)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad(), LargestTensor() as largest:
        assert linear_cross_entropy(hidden, weight, targets, chunk_tokens=1).item() == pytest.approx(
            loss.item(), rel=1e-6
        )
    assert largest.elements < weight.numel()


def test_the_graph_can_be_used_twice() -> None:
    hidden, weight, bias, targets = head_inputs(torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets, bias)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(3 * loss, weight)[0], 3 * first)


def test_chunks_shrink_with_the_vocabulary_and_grow_with_the_width() -> None:
    assert tokens_per_chunk(128_256, 512, device_type="cpu") == 261
    assert tokens_per_chunk(32_000, 512, device_type="cpu") == 1048
    assert tokens_per_chunk(128_256, 4096, device_type="cuda") == 1024


class LargestTensor(TorchDispatchMode):
    """Watches every operation and remembers the size of the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        made = storages(result)
        self.elements = max([self.elements, *(made[storage] for storage in made.keys() - given.keys())])
        return result


def storages(tensors: Any) -> dict[int, int]:
    """Elements in each piece of memory that the tensors lie in: a view is not a new one."""
    return {leaf.untyped_storage().data_ptr(): leaf.numel() for leaf in tree_leaves(tensors) if torch.is_tensor(leaf)}


# --------------------------------------------------------------------------------------------------- inside a model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_trains_as_with_its_own_loss(family: str) -> None:
    model_type, changes = FAMILIES[family]
    model = build(model_type, **changes)
    own = model(**rows())
    own.loss.backward()
    expected = gradients(model)

    use_chunked_loss(model)
    chunked = model(**rows())
    chunked.loss.backward()
    assert chunked.logits is None
    torch.testing.assert_close(chunked.loss, own.loss, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model), expected)
    assert torch.equal(model(input_ids=rows()["input_ids"]).logits, own.logits)


def test_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, num_tokens = 5000, 600
    model = build(vocab_size=vocabulary)
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 100 * vocabulary)
    use_chunked_loss(model)
    with LargestTensor() as largest:
        model(**rows(1, num_tokens)).loss.backward()
    assert largest.elements == 100 * vocabulary


@pytest.mark.parametrize("num_items", [9, torch.tensor(9), None])
def test_the_loss_is_divided_by_the_items_of_the_whole_batch_where_given(num_items: Any) -> None:
    model = build()
    expected = model(**rows(), num_items_in_batch=num_items).loss
    use_chunked_loss(model)
    torch.testing.assert_close(model(**rows(), num_items_in_batch=num_items).loss, expected, rtol=1e-6, atol=0)


def test_a_batch_without_supervised_tokens_has_zero_loss_and_zero_gradients() -> None:
    model = build()
    use_chunked_loss(model)
    batch = rows()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_packed_losses_and_gradients_are_the_sums_over_the_samples_alone() -> None:
    register_varlen_attention()
    model = build(attention="varlen")
    use_chunked_loss(model)
    samples = [rows(1, length, seed=length) for length in (6, 17, 5, 9)]
    total = sum(model(**sample, num_items_in_batch=1).loss for sample in samples)
    total.backward()
    expected = gradients(model)

    lengths = [sample["input_ids"].shape[1] for sample in samples]
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = model(
        input_ids=torch.cat([sample["input_ids"] for sample in samples], dim=1),
        labels=torch.cat([sample["labels"] for sample in samples], dim=1),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seq_lens_q=boundaries,
        cu_seq_lens_k=boundaries,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
        num_items_in_batch=1,
    ).loss
    packed.backward()
    torch.testing.assert_close(packed, total, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model), expected)


def test_trainer_normalises_by_the_tokens_of_all_accumulated_batches(tmp_path: Any) -> None:
    batches = [rows(1, length, seed=length) for length in (6, 30)]
    data = [{key: value[0] for key, value in batch.items()} for batch in batches]

    def train(accumulation: int, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=accumulation,
            learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, report_to=[], use_cpu=True,
            save_strategy="no", data_seed=0, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data)
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        return dict(model.named_parameters())

    model = build()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    use_chunked_loss(model)
    sum(model(**batch, num_items_in_batch=2 + 26).loss for batch in batches).backward()
    expected = {name: before[name] - 0.1 * gradient for name, gradient in gradients(model).items()}
    trained = train(2, model)
    for name, parameter in expected.items():
        torch.testing.assert_close(trained[name].detach(), parameter, rtol=1e-5, atol=1e-7)


def test_a_copy_of_the_model_trains_its_own_weights() -> None:
    model = build()
    use_chunked_loss(model)
    twin = copy.deepcopy(model)
    twin(**rows()).loss.backward()
    assert twin.lm_head.weight.grad is not None
    assert model.lm_head.weight.grad is None


def test_distributed_data_parallel_finds_a_gradient_for_every_weight(tmp_path: Any) -> None:
    model = build(tie_word_embeddings=True).train()
    use_chunked_loss(model)
    model.gradient_checkpointing_enable()
    model(**rows()).loss.backward()
    expected = gradients(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            parallel(**rows()).loss.backward()
        assert_same_gradients(gradients(model), expected)
    finally:
        torch.distributed.destroy_process_group()


# --------------------------------------------------------------------------------------------------- adapters, refusals


@pytest.mark.parametrize("first", ["loss", "adapter"])
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_adapters_train_as_with_the_models_own_loss(modules_to_save: list[str] | None, first: str) -> None:
    adapter = LoraConfig(target_modules="all-linear", modules_to_save=modules_to_save, init_lora_weights=False)

    def train(chunked: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        base = build()
        if chunked and first == "loss":
            use_chunked_loss(base)
        torch.manual_seed(0)
        model = get_peft_model(base, adapter)
        if chunked and first == "adapter":
            use_chunked_loss(base)
        if modules_to_save:
            with torch.no_grad():
                base.lm_head.modules_to_save["default"].weight.mul_(2)
        loss = model(**rows()).loss
        loss.backward()
        return loss, gradients(model)

    expected_loss, expected = train(chunked=False)
    loss, ours = train(chunked=True)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert any("lora" in name for name in ours)
    assert any("lm_head" in name for name in ours) == bool(modules_to_save)
    assert_same_gradients(ours, expected)


def test_a_disabled_adapter_leaves_the_original_head() -> None:
    base = build()
    expected = base(**rows()).loss
    use_chunked_loss(base)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        base.lm_head.modules_to_save["default"].weight.mul_(2)
    with model.disable_adapter():
        torch.testing.assert_close(model(**rows()).loss, expected, rtol=1e-6, atol=0)
    assert abs(model(**rows()).loss - expected) > 1e-3


def test_low_rank_updates_of_the_head_are_refused() -> None:
    base = build()
    use_chunked_loss(base)
    model = get_peft_model(base, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"output head of LlamaForCausalLM is .*modules_to_save"):
        model(**rows())


def test_the_routers_auxiliary_loss_is_refused() -> None:
    model = build("mixtral", num_local_experts=4, output_router_logits=True)
    use_chunked_loss(model)
    with pytest.raises(ValueError, match="output_router_logits: false"):
        model(**rows())


class TripledLogits(LlamaForCausalLM):
    """A model that does to its logits what no config key tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 3
        return outputs


def test_a_model_with_unknown_logits_is_refused() -> None:
    with pytest.raises(ValueError, match="TripledLogits does more to its logits"):
        use_chunked_loss(TripledLogits(LlamaConfig(**SMALL)))
