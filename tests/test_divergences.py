"""The chunked losses of distillation are those that plain torch makes of whole distributions, gradients included."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from distilling.config import DistillationConfig, DivergenceName, TeacherModelConfig
from distilling.divergences import DenseTeacher, LossParts, LossSettings, distillation_loss
from distilling.targets import RowTargets, SparseTargets
from tests.test_losses import LargestTensor
from training.losses import Head, LogitShape

DIVERGENCES: list[DivergenceName] = [
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
    "adaptive_kl",
]
SHAPES = [LogitShape(), LogitShape(scale=0.3), LogitShape(softcap=2.0), LogitShape(scale=1.7, softcap=3.0)]
TEACHER_SHAPE = LogitShape(scale=1.3, softcap=4.0)
SETTINGS = LossSettings(divergence="forward_kl", weight=0.3, temperature=1.0, skew=0.1, mixing=0.4)


# ---------------------------------------------------------------------------------------- references, in plain torch


def shaped(logits: torch.Tensor, shape: LogitShape) -> torch.Tensor:
    logits = logits * shape.scale
    return logits if shape.softcap is None else torch.tanh(logits / shape.softcap) * shape.softcap


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p.log() - q.log())).sum(1)


def reference_divergence(p: torch.Tensor, q: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    skew, mixing = settings.skew, settings.mixing
    if settings.divergence == "forward_kl":
        return kl(p, q)
    if settings.divergence == "reverse_kl":
        return kl(q, p)
    if settings.divergence == "jensen_shannon":
        middle = mixing * p + (1 - mixing) * q
        return mixing * kl(p, middle) + (1 - mixing) * kl(q, middle)
    if settings.divergence == "skewed_forward_kl":
        return kl(p, skew * p + (1 - skew) * q)
    if settings.divergence == "skewed_reverse_kl":
        return kl(q, (1 - skew) * p + skew * q)
    if settings.divergence == "total_variation":
        return (p - q).abs().sum(1) / 2
    falling, order = p.sort(dim=1, descending=True)
    in_head = falling.cumsum(1) <= 0.5
    in_head[:, 0] = True
    gaps = (p - q).detach().abs().gather(1, order)
    share = (gaps * in_head).sum(1) / gaps.sum(1)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def reference_sparse(teacher: SparseTargets, q: torch.Tensor) -> torch.Tensor:
    """Token by token, over sets of ids."""
    losses = []
    for row in range(len(q)):
        log_p = teacher.log_probabilities_NS[row].double()
        real = [place for place in range(len(log_p)) if log_p[place] > -math.inf]
        ids = teacher.ids_NS[row]
        loss = sum(
            (teacher.weights_NS[row, place].double() * (log_p[place] - q[row, ids[place]].log()) for place in real),
            torch.zeros((), dtype=torch.float64),
        )
        if teacher.log_tail_N is not None:
            rest = sorted(set(range(q.shape[1])) - {int(ids[place]) for place in real})
            log_tail = teacher.log_tail_N[row].double()
            loss = loss + log_tail.exp() * (log_tail - q[row, rest].sum().log())
        losses.append(loss)
    return torch.stack(losses)


def reference_parts(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    teacher: SparseTargets | DenseTeacher,
    settings: LossSettings,
    *,
    token_weights: torch.Tensor | None = None,
    shape: LogitShape = LogitShape(),  # noqa: B008
) -> LossParts:
    logits = shaped(linear(hidden, *head), shape)
    weights = torch.ones(len(targets), dtype=logits.dtype) if token_weights is None else token_weights
    cross_entropies = cross_entropy(logits, targets, reduction="none")
    q = torch.softmax(logits / settings.temperature, dim=1)
    if isinstance(teacher, SparseTargets):
        divergences = reference_sparse(teacher, q)
    else:
        teacher_logits = shaped(linear(teacher.hidden_NJ, *teacher.head), teacher.shape)
        divergences = reference_divergence(torch.softmax(teacher_logits / settings.temperature, dim=1), q, settings)
    parts = (weights * cross_entropies).sum(), (weights * divergences).sum()
    loss = (1 - settings.weight) * parts[0] + settings.weight * settings.temperature**2 * parts[1]
    return LossParts(loss, *parts)


# -------------------------------------------------------------------------------------------------------- inputs


class Case:
    """A student, a teacher of another width, and targets, in float64 where not told otherwise."""

    def __init__(
        self, num_tokens: int = 23, vocabulary: int = 101, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = draw(num_tokens, 16).requires_grad_()
        self.head = Head((draw(vocabulary, 16) / 4).requires_grad_(), draw(vocabulary).requires_grad_())
        self.targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
        self.dense = DenseTeacher(draw(num_tokens, 12), Head(draw(vocabulary, 12) / 3, draw(vocabulary)), TEACHER_SHAPE)
        self.leaves = (self.hidden, self.head.weight, self.head.bias)

    def log_p(self, temperature: float = 1.0) -> torch.Tensor:
        logits = shaped(linear(self.dense.hidden_NJ, *self.dense.head), self.dense.shape)
        return torch.log_softmax(logits / temperature, dim=1)

    def topk(self, k: int, temperature: float = 1.0) -> SparseTargets:
        """Beside the top k: a rare token that is kept, one that is listed again, and filling that says id 0."""
        log_p = self.log_p(temperature)
        ids = torch.cat([log_p.topk(k).indices, log_p.argmin(1, keepdim=True), log_p.argmax(1, keepdim=True)], dim=1)
        weights = log_p.gather(1, ids).exp()
        weights[:, -1] = 0
        kept = torch.zeros_like(log_p, dtype=torch.bool).scatter_(1, ids, True)
        count = len(ids)
        return SparseTargets(
            torch.cat([torch.zeros(count, 1, dtype=torch.long), ids], dim=1),
            torch.cat([torch.full((count, 1), -math.inf), log_p.gather(1, ids)], dim=1),
            torch.cat([torch.zeros(count, 1), weights], dim=1),
            log_p.masked_fill(kept, -math.inf).logsumexp(1),
        )

    def loss(self, teacher: SparseTargets | DenseTeacher, settings: LossSettings, **named: Any) -> LossParts:
        return distillation_loss(self.hidden, self.head, self.targets, teacher, settings, **named)

    def reference(self, teacher: SparseTargets | DenseTeacher, settings: LossSettings, **named: Any) -> LossParts:
        return reference_parts(self.hidden, self.head, self.targets, teacher, settings, **named)


def renormalised(teacher: SparseTargets) -> SparseTargets:
    mass = teacher.weights_NS.sum(1, keepdim=True)
    return SparseTargets(teacher.ids_NS, teacher.log_probabilities_NS - mass.log(), teacher.weights_NS / mass, None)


def with_draws(case: Case, k: int, draws: int, seed: int) -> SparseTargets:
    """A hybrid target: the exact top k, and draws from the rest that share its mass; a sampled one where k is 0."""
    log_p = case.log_p()
    ids = log_p.topk(k).indices
    rest = log_p.exp().scatter(1, ids, 0)
    drawn = torch.multinomial(rest, draws, replacement=True, generator=torch.Generator().manual_seed(seed))
    exact = log_p.gather(1, ids).exp()
    shares = (rest.sum(1, keepdim=True) / draws).expand(-1, draws)
    every = torch.cat([ids, drawn], dim=1)
    return SparseTargets(every, log_p.gather(1, every), torch.cat([exact, shares], dim=1), None)


def gradients(parts: LossParts, case: Case) -> list[torch.Tensor]:
    return list(torch.autograd.grad(parts.loss, case.leaves))


def assert_same(ours: LossParts, expected: LossParts, case: Case, within: float, names: str = "all") -> None:
    fields = LossParts._fields if names == "all" else ("loss",)
    for name in fields:
        torch.testing.assert_close(
            getattr(ours, name).double(), getattr(expected, name).double(), rtol=within, atol=1e-12, msg=name
        )
    for gradient, reference in zip(gradients(ours, case), gradients(expected, case), strict=True):
        assert (gradient.double() - reference.double()).norm() <= within * reference.double().norm()


# ---------------------------------------------------------------------------------------- the whole distribution


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_live_teachers_divergence_and_its_gradients_are_those_of_autograd(
    divergence: DivergenceName, temperature: float
) -> None:
    case = Case()
    for shape in SHAPES:
        for weight in (0.3, 1.0):
            settings = replace(SETTINGS, divergence=divergence, temperature=temperature, weight=weight)
            ours = case.loss(case.dense, settings, shape=shape, chunk_tokens=7)
            expected = case.reference(case.dense, settings, shape=shape)
            assert_same(ours, expected, case, within=1e-9, names="all" if weight < 1 else "loss")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_holds_for_students_far_from_the_teacher(divergence: DivergenceName) -> None:
    case, exact = Case(dtype=torch.float32), Case()
    settings = replace(SETTINGS, divergence=divergence, weight=1.0, temperature=0.25)
    shape = LogitShape(scale=4.0)
    ours = case.loss(case.dense, settings, shape=shape)
    with torch.no_grad():
        for leaf, single in zip(exact.leaves, case.leaves, strict=True):
            leaf.copy_(single)
    head = Head(case.dense.head.weight.double(), case.dense.head.bias.double())
    teacher = DenseTeacher(case.dense.hidden_NJ.double(), head, TEACHER_SHAPE)
    # Logits of tens, divided by a quarter: the smallest probabilities are beyond float32.
    expected = exact.loss(teacher, settings, shape=shape)
    torch.testing.assert_close(ours.loss.double(), expected.loss, rtol=1e-5, atol=0)
    for gradient, reference in zip(gradients(ours, case), gradients(expected, exact), strict=True):
        assert (gradient - reference).norm() <= 1e-4 * reference.norm()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(divergence: DivergenceName) -> None:
    case = Case()
    teacher = DenseTeacher(case.hidden, case.head)
    ours = case.loss(teacher, replace(SETTINGS, divergence=divergence, weight=1.0))
    assert abs(ours.loss.item()) < 1e-12
    if divergence != "total_variation":  # its gradient jumps there
        assert all(gradient.norm() < 1e-12 for gradient in gradients(ours, case))


# ------------------------------------------------------------------------------------------------ a few tokens of it


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("kind", ["bucket", "renormalised", "sampled", "hybrid"])
def test_a_caches_divergence_and_its_gradients_are_those_of_autograd(
    kind: str, weight: float, temperature: float
) -> None:
    case = Case()
    teacher = {
        "bucket": case.topk(5, temperature),
        "renormalised": renormalised(case.topk(5, temperature)),
        "sampled": with_draws(case, 0, 9, seed=1),
        "hybrid": with_draws(case, 4, 6, seed=1),
    }[kind]
    settings = replace(SETTINGS, weight=weight, temperature=temperature)
    for shape in SHAPES:
        ours = case.loss(teacher, settings, shape=shape, chunk_tokens=7)
        expected = case.reference(teacher, settings, shape=shape)
        assert_same(ours, expected, case, within=1e-9, names="all" if weight < 1 else "loss")


def test_filling_leaves_token_0_in_the_tail_and_an_id_listed_again_is_left_out_once() -> None:
    case = Case()
    teacher = case.topk(5)
    tidy = SparseTargets(
        teacher.ids_NS[:, 1:-1], teacher.log_probabilities_NS[:, 1:-1], teacher.weights_NS[:, 1:-1], teacher.log_tail_N
    )
    assert not (tidy.ids_NS == 0).any(dim=1).all()
    assert_same(case.loss(teacher, SETTINGS), case.loss(tidy, SETTINGS), case, within=1e-12)


def test_rows_of_different_widths_are_joined_with_filling_that_counts_for_nothing() -> None:
    case = Case(num_tokens=6)
    whole = case.topk(5)
    tidy = [values[:, 1:-1].numpy() for values in (whole.ids_NS, whole.log_probabilities_NS, whole.weights_NS)]
    assert whole.log_tail_N is not None
    tail = whole.log_tail_N.numpy()
    narrow = RowTargets(*(values[:4] for values in tidy), tail[:4])
    wide = RowTargets(*(np.concatenate([values, values[:, :2]], axis=1)[4:] for values in tidy), tail[4:])
    wide.weights_NS[:, -2:] = 0
    joined = SparseTargets.joined([narrow, wide])
    assert joined.ids_NS.shape == (6, 8)
    expected = SparseTargets(*map(torch.from_numpy, tidy), torch.from_numpy(tail))
    assert_same(case.loss(joined, SETTINGS), case.loss(expected, SETTINGS), case, within=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("has_tail", [True, False])
def test_a_cache_of_every_token_gives_what_the_live_teacher_gives(has_tail: bool, temperature: float) -> None:
    case = Case(num_tokens=100, dtype=torch.float32)
    log_p = case.log_p(temperature)
    every = torch.arange(log_p.shape[1]).expand_as(log_p)
    tail = torch.full((100,), -math.inf) if has_tail else None
    settings = replace(SETTINGS, temperature=temperature)
    ours = case.loss(SparseTargets(every, log_p, log_p.exp(), tail), settings)
    expected = case.loss(case.dense, settings)
    assert abs(ours.divergence - expected.divergence) < 1e-4
    assert_same(ours, expected, case, within=1e-5)


def test_the_mass_of_the_rest_is_exact_where_the_student_gives_it_next_to_nothing() -> None:
    hidden = torch.ones(1, 1, requires_grad=True)
    logits = torch.tensor([[60.0], [0.0], [-1.0], [-200.0]], requires_grad=True)
    teacher = SparseTargets(torch.tensor([[0]]), torch.tensor([[-1.0]]), torch.tensor([[math.exp(-1)]]), None)
    tail = math.log(1 - math.exp(-1))
    settings = replace(SETTINGS, weight=1.0)
    ours = distillation_loss(
        hidden, Head(logits, None), torch.tensor([0]), replace(teacher, log_tail_N=torch.tensor([tail])), settings
    )
    rest = math.log(1 + math.exp(-1)) - 60
    assert ours.loss.item() == pytest.approx(-math.exp(-1) + math.exp(tail) * (tail - rest), rel=1e-6)
    gradient = torch.autograd.grad(ours.loss, logits)[0].flatten()
    share = 1 / (1 + math.exp(-1))
    expected = [math.exp(tail), -math.exp(tail) * share, -math.exp(tail) * (1 - share), 0]
    assert gradient.tolist() == pytest.approx(expected, rel=1e-6)


def test_draws_have_the_gradient_of_the_whole_distribution_on_average() -> None:
    case = Case(num_tokens=3, vocabulary=41)
    settings = replace(SETTINGS, weight=1.0)
    expected = gradients(case.loss(case.dense, settings), case)
    for k in (0, 4):
        draws = [with_draws(case, k, 8, seed) for seed in range(400)]
        everything = SparseTargets(
            torch.cat([teacher.ids_NS for teacher in draws], dim=1),
            torch.cat([teacher.log_probabilities_NS for teacher in draws], dim=1),
            torch.cat([teacher.weights_NS for teacher in draws], dim=1) / len(draws),
            None,
        )
        # The gradient is linear in the weights, so the mean of the targets has the mean of the gradients.
        singles = [gradients(case.loss(teacher, settings), case) for teacher in draws[:20]]
        for place, reference in enumerate(expected):
            mean = gradients(case.loss(everything, settings), case)[place]
            assert (mean - reference).norm() < 0.06 * reference.norm()
            assert (singles[0][place] - reference).norm() > (mean - reference).norm()


def test_scaling_up_the_kept_tokens_biases_the_gradient_more_than_the_bucket_does() -> None:
    case = Case()
    settings = replace(SETTINGS, weight=1.0)
    exact = gradients(case.loss(case.dense, settings), case)[0]
    bucket = gradients(case.loss(case.topk(5), settings), case)[0]
    scaled = gradients(case.loss(renormalised(case.topk(5)), settings), case)[0]
    assert (bucket - exact).norm() < (scaled - exact).norm()


# ------------------------------------------------------------------------------------------------------ the mixture


def test_the_square_of_the_temperature_keeps_the_size_of_the_gradient() -> None:
    case = Case(num_tokens=64)
    norms = {}
    for temperature in (1.0, 2.0, 4.0, 8.0):
        settings = replace(SETTINGS, weight=1.0, temperature=temperature)
        teacher = replace(case.dense, shape=LogitShape(scale=0.5))
        norms[temperature] = gradients(case.loss(teacher, settings, shape=LogitShape(scale=0.5)), case)[0].norm().item()
    assert all(norm == pytest.approx(norms[1.0], rel=0.15) for norm in norms.values())
    assert norms[8.0] / 8**2 < 0.02 * norms[1.0]


def test_a_weight_of_0_is_cross_entropy_alone_and_of_1_the_divergence_alone() -> None:
    case = Case()
    for teacher in (case.dense, case.topk(5)):
        for temperature in (1.0, 2.0):
            expected = case.reference(teacher, replace(SETTINGS, temperature=temperature))
            data = case.loss(teacher, replace(SETTINGS, weight=0.0, temperature=temperature))
            torch.testing.assert_close(data.loss, expected.cross_entropy)
            assert data.divergence == 0
            taught = case.loss(teacher, replace(SETTINGS, weight=1.0, temperature=temperature))
            torch.testing.assert_close(taught.loss, temperature**2 * taught.divergence)
            assert taught.cross_entropy == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_each_token_counts_by_its_weight(temperature: float) -> None:
    case = Case()
    weights = torch.linspace(0, 2, len(case.targets), dtype=torch.float64)
    settings = replace(SETTINGS, temperature=temperature)
    for teacher in (case.dense, case.topk(5, temperature)):
        ours = case.loss(teacher, settings, token_weights_N=weights, chunk_tokens=7)
        assert_same(ours, case.reference(teacher, settings, token_weights=weights), case, within=1e-9)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 23])
def test_chunks_change_neither_loss_nor_gradients(chunk_tokens: int) -> None:
    case = Case(dtype=torch.float32)
    for teacher in (case.dense, case.topk(5)):
        whole = case.loss(teacher, SETTINGS, chunk_tokens=1000)
        assert_same(case.loss(teacher, SETTINGS, chunk_tokens=chunk_tokens), whole, case, within=1e-6)


def test_the_losses_of_two_halves_add_up_to_that_of_the_whole() -> None:
    case = Case()
    teacher = case.topk(5)
    for whole in (case.dense, teacher):
        expected = case.loss(whole, SETTINGS)
        halves = []
        for half in (slice(0, 11), slice(11, None)):
            part = teacher.rows(half) if whole is teacher else replace(case.dense, hidden_NJ=case.dense.hidden_NJ[half])
            halves.append(distillation_loss(case.hidden[half], case.head, case.targets[half], part, SETTINGS))
        ours = LossParts(*(sum(parts, torch.zeros(())) for parts in zip(*halves, strict=True)))
        assert_same(ours, expected, case, within=1e-12)


def test_no_tokens_are_exactly_0_with_gradients_of_0() -> None:
    case = Case(num_tokens=0)
    for teacher in (case.dense, case.topk(5)):
        for weight in (0.0, 0.3, 1.0):
            parts = case.loss(teacher, replace(SETTINGS, weight=weight, temperature=2.0))
            assert [part.item() for part in parts] == [0, 0, 0]
            for gradient, leaf in zip(gradients(parts, case), case.leaves, strict=True):
                assert gradient.shape == leaf.shape
                assert not gradient.any()


# ------------------------------------------------------------------------------------------- precision, memory, work


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bfloat16_products_change_little(divergence: DivergenceName) -> None:
    case = Case(num_tokens=64, dtype=torch.float32)
    settings = replace(SETTINGS, divergence=divergence, temperature=2.0)
    teachers: list[SparseTargets | DenseTeacher] = [case.dense]
    if divergence == "forward_kl":
        teachers.append(case.topk(5, 2.0))
    for teacher in teachers:
        exact = case.loss(teacher, settings)
        with torch.autocast("cpu", torch.bfloat16):
            ours = case.loss(teacher, settings, chunk_tokens=5)
        assert ours.loss.dtype == torch.float32
        torch.testing.assert_close(ours.loss, exact.loss, rtol=0.01, atol=0)
        for gradient, reference in zip(gradients(ours, case), gradients(exact, case), strict=True):
            assert gradient.dtype == torch.float32
            assert (gradient - reference).norm() < 0.03 * reference.norm()


def test_only_what_needs_a_gradient_gets_one() -> None:
    case = Case()
    for teacher in (case.dense, case.topk(5)):
        expected = gradients(case.loss(teacher, SETTINGS), case)
        frozen = Head(case.head.weight.detach(), None)
        loss = distillation_loss(case.hidden, frozen, case.targets, teacher, SETTINGS).loss
        assert torch.autograd.grad(loss, case.hidden)[0].shape == case.hidden.shape
        loss = distillation_loss(case.hidden.detach(), case.head, case.targets, teacher, SETTINGS).loss
        torch.testing.assert_close(list(torch.autograd.grad(loss, (case.head.weight, case.head.bias))), expected[1:])
        with torch.no_grad(), LargestTensor() as largest:
            assert not case.loss(teacher, SETTINGS, chunk_tokens=1).loss.requires_grad
        assert largest.elements < case.head.weight.numel()


def test_logits_of_all_tokens_never_exist() -> None:
    case = Case(num_tokens=300, vocabulary=500, dtype=torch.float32)
    for teacher in (case.dense, case.topk(64)):
        with LargestTensor() as largest:
            case.loss(teacher, SETTINGS, chunk_tokens=100).loss.backward()
        assert largest.elements == 100 * 500


def test_the_teacher_gets_no_gradient() -> None:
    case = Case()
    hidden = case.dense.hidden_NJ.requires_grad_()
    case.loss(case.dense, SETTINGS).loss.backward()
    assert hidden.grad is None


def test_a_runs_settings_are_those_of_its_config() -> None:
    config = DistillationConfig(
        teacher_model=TeacherModelConfig(name="teacher"), weight=0.25, temperature=2.0, teacher="live", mixing=0.3
    )
    assert LossSettings.of(config) == LossSettings(
        divergence="forward_kl", weight=0.25, temperature=2.0, skew=0.1, mixing=0.3
    )
