"""The chunked loss of an unrolled draft against the published formulas, dense in float64, and against hand counts."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import pytest
import torch
from drafting_models import packed

from benchmarks import eagle3 as benchmark
from drafting import loss as loss_module
from drafting.loss import Teacher, UnrolledLoss, unrolled_cross_entropy
from training import losses
from training.batches import IGNORED

WEIGHTS = (1.0, 0.8, 0.64)


def make_teacher(hidden_TH: torch.Tensor, head_VH: torch.Tensor, draft_ids: Sequence[int]) -> Teacher:
    index = torch.full((len(head_VH),), -1)
    index[list(draft_ids)] = torch.arange(len(draft_ids))
    return Teacher(hidden_TH, head_VH, torch.tensor(draft_ids), index)


def random_case(lengths: Sequence[int], *, supervised: float = 0.7) -> dict[str, torch.Tensor | Teacher]:
    torch.manual_seed(5)
    tokens = sum(lengths)
    kinds = {"dtype": torch.float64}
    labels = torch.randint(0, 30, (tokens,)).where(torch.rand(tokens) < supervised, IGNORED)
    return {
        "normed": torch.randn(3, tokens, 8, **kinds, requires_grad=True),
        "head": torch.randn(12, 8, **kinds, requires_grad=True),
        "teacher": make_teacher(torch.randn(tokens, 8, **kinds), torch.randn(30, 8, **kinds), range(0, 24, 2)),
        "labels": labels,
        "positions": packed(*lengths).position_ids_1T[0],
    }


def loss_of(case: dict[str, torch.Tensor | Teacher], **arguments: object) -> UnrolledLoss:
    return unrolled_cross_entropy(
        case["normed"],
        case["head"],
        case["teacher"],
        labels_T=case["labels"],
        positions_T=case["positions"],
        step_weights=WEIGHTS,
        **arguments,
    )


def published(case: dict[str, torch.Tensor | Teacher], lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of each step and hits, sample by sample, as the published trainer does: everything shifts left."""
    normed, head, teacher = case["normed"], case["head"], case["teacher"]
    in_draft = teacher.draft_index_V >= 0
    sums = torch.zeros(3, dtype=torch.float64)
    hits = torch.zeros(3, sum(lengths), dtype=torch.bool)
    start = 0
    for length in lengths:
        sample = slice(start, start + length)
        target = (teacher.hidden_TH[sample] @ teacher.head_VH.T).roll(-1, dims=0)
        # What x_{p + 2} is, at p; beyond the end nothing is supervised.
        mask = torch.cat([case["labels"][sample][2:] != IGNORED, torch.zeros(2, dtype=torch.bool)])[:length]
        for step in range(3):
            position_mask = in_draft[target.argmax(-1)] * mask
            target_p = target[:, in_draft].softmax(-1)
            logits = normed[step, sample] @ head.T
            sums[step] -= (position_mask[:, None] * target_p * logits.log_softmax(-1)).sum()
            hits[step, sample] = (logits.argmax(-1) == target_p.argmax(-1)) & position_mask
            target = target.roll(-1, dims=0)
            mask = torch.cat([mask[1:], torch.zeros(1, dtype=torch.bool)])
        start += length
    return sums, hits


@pytest.mark.parametrize("lengths", [[11], [4, 1, 7, 2, 3]])
@pytest.mark.parametrize("chunk_guesses", [1, 3, 100])
def test_loss_gradients_and_hits_are_those_of_the_published_formulas(lengths: list[int], chunk_guesses: int) -> None:
    case = random_case(lengths)
    expected_sums, expected_hits = published(case, lengths)
    expected = expected_sums @ torch.tensor(WEIGHTS, dtype=torch.float64)
    expected_gradients = torch.autograd.grad(expected * 3, [case["normed"], case["head"]])
    result = loss_of(case, chunk_guesses=chunk_guesses)
    gradients = torch.autograd.grad(result.loss * 3, [case["normed"], case["head"]])
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(result.hits_IT, expected_hits)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[9], [2, 5, 4]])
def test_an_index_learns_at_a_step_exactly_where_its_token_is_supervised_and_in_its_sample(lengths: list[int]) -> None:
    case = random_case(lengths, supervised=0.5)
    case["teacher"] = make_teacher(case["teacher"].hidden_TH, case["teacher"].head_VH[:12], range(12))
    (gradient,) = torch.autograd.grad(loss_of(case).loss, [case["normed"]])
    positions, labels = case["positions"], case["labels"]
    for step in range(3):
        for index in range(sum(lengths)):
            token = index + 2 + step
            same_sample = token < len(positions) and positions[token] == positions[index] + 2 + step
            supervised = same_sample and bool(labels[token] != IGNORED)
            assert bool(gradient[step, index].any()) == supervised, (step, index)


def test_a_small_case_by_hand() -> None:
    """Three tokens, so one guess. Target: 1/2, 1/4, 1/8, 1/8 for tokens 0 to 3, of which the draft knows 0 and 3."""
    teacher = make_teacher(
        torch.tensor([[9.0], [1.0], [9.0]]), torch.tensor([[-log(2)], [-log(4)], [-log(8)], [-log(8)]]), [0, 3]
    )
    normed = torch.zeros(3, 3, 1, requires_grad=True)
    head = torch.ones(2, 1, requires_grad=True)
    labels, positions = torch.tensor([IGNORED, IGNORED, 0]), torch.arange(3)

    def loss(teacher: Teacher) -> UnrolledLoss:
        return unrolled_cross_entropy(
            normed, head, teacher, labels_T=labels, positions_T=positions, step_weights=WEIGHTS
        )

    # The draft says 1/2 to each of its two tokens, whatever the target says; on a tie the first counts as its guess.
    result = loss(teacher)
    assert result.loss.item() == pytest.approx(log(2))
    assert result.hits_IT.tolist() == [[True, False, False], [False] * 3, [False] * 3]
    # d loss / d hidden = sum over tokens of (1/2 - p) x weight of the head, with p = 4/5, 1/5; heads of 1 and 3:
    head = torch.tensor([[1.0], [3.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(teacher).loss, [normed])
    assert gradient[0, 0].item() == pytest.approx((0.5 - 0.8) * 1 + (0.5 - 0.2) * 3)
    # Where the draft does not know the most probable token, nothing is learned and nothing hits.
    result = loss(make_teacher(teacher.hidden_TH, teacher.head_VH, [1, 3]))
    assert result.loss.item() == 0 and not result.hits_IT.any()
    assert not torch.autograd.grad(result.loss, [normed])[0].any()


def test_a_batch_that_teaches_nothing_has_a_loss_of_zero_and_gradients_of_zero() -> None:
    case = random_case([11], supervised=0)
    result = loss_of(case)
    gradients = torch.autograd.grad(result.loss, [case["normed"], case["head"]])
    assert result.loss.item() == 0
    assert not any(gradient.any() for gradient in gradients)


def test_the_loss_is_the_same_without_gradients() -> None:
    case = random_case([6, 5])
    with torch.no_grad():
        alone = loss_of(case).loss
    assert not alone.requires_grad
    assert torch.equal(alone, loss_of(case).loss.detach())


def test_gradients_of_the_head_are_summed_in_float32_under_autocast() -> None:
    """1024 tokens with the same small gradient: bfloat16 would stop adding them after 256."""
    tokens = 1024 + 2
    teacher = make_teacher(torch.ones(tokens, 1), torch.tensor([[3.0], [0.0]]), [0, 1])
    normed = torch.ones(1, tokens, 1, requires_grad=True)
    head = torch.zeros(2, 1, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = unrolled_cross_entropy(
            normed,
            head,
            teacher,
            labels_T=torch.zeros(tokens, dtype=torch.long),
            positions_T=torch.arange(tokens),
            step_weights=(1.0,),
            chunk_guesses=1,
        ).loss
    (gradient,) = torch.autograd.grad(loss, [head])
    expected = 1024 * (0.5 - torch.tensor([3.0, 0.0]).softmax(0))
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient[:, 0], expected, rtol=5e-3, atol=0)


def test_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[int] = []

    def counting(*arguments: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(*arguments)
        largest.append(logits.numel())
        return logits

    monkeypatch.setattr(loss_module, "linear", counting)
    monkeypatch.setattr(losses, "linear", counting)
    loss_of(random_case([40]), chunk_guesses=6)
    # Six guesses of the draft, of which each token of the target has three.
    assert max(largest) == max(6 * 12, 3 * 30)


def test_a_whole_step_is_that_of_the_published_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features to gradients, against the straightforward implementation that the benchmark measures."""
    width = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    for name, value in {"VOCABULARY": 60, "DRAFT_VOCABULARY": 15, "WIDTHS": {"cpu": width}}.items():
        monkeypatch.setattr(benchmark, name, value)
    inputs = benchmark.make_inputs(12, torch.device("cpu"))
    gradients = []
    for engine in benchmark.ENGINES.values():
        loss = engine(inputs)
        gradients.append([loss.detach(), *torch.autograd.grad(loss, list(inputs.draft.parameters()))])
    for ours, published in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, published, rtol=1e-4, atol=1e-6)
