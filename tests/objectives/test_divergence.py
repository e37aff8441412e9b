"""Soft targets equal a float64 reference that builds everything, in value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distill_sampler.objectives import divergence as subject
from distill_sampler.objectives.divergence import Cells, Divergence, Head, soft_target_loss
from distill_sampler.reading.head import LogitTransform

POSITIONS, HIDDEN, VOCAB = 23, 8, 40
ALL: tuple[Divergence, ...] = ("forward", "reverse", "js")
TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(scale=0.3),
    "capped": LogitTransform(scale=2.0, softcap=3.0),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of several blocks, the last ones not full."""
    monkeypatch.setattr(subject, "_CHUNK_LOGITS", {"cpu": 5 * VOCAB})
    monkeypatch.setattr(subject, "_BLOCK_LOGITS", 2 * VOCAB)


def divergence_by_the_book(p: Tensor, q: Tensor, kind: Divergence) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(-1)

    if kind == "forward":
        return kl(p.detach(), q)
    if kind == "reverse":
        return kl(q, p)
    m = (p + q) / 2
    return (kl(p.detach(), m) + kl(q, m)) / 2


def problem(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return {
        "hidden": draw(POSITIONS, HIDDEN).requires_grad_(),
        "weight": draw(VOCAB, HIDDEN).requires_grad_(),
        "bias": draw(VOCAB).requires_grad_(),
        "teacher": draw(POSITIONS, VOCAB, scale=2.0),
        "coefficients": draw(POSITIONS).abs(),
    }


def gradients(loss: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [given[name] for name in ("hidden", "weight", "bias")]))


def reference(given: dict[str, Tensor], cells_of: Any, transform: LogitTransform, T: float, kind: Divergence) -> Tensor:
    """Everything at once, in float64, through autograd."""
    logits = (given["hidden"] @ given["weight"].T + given["bias"]) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    q, p = torch.softmax(logits / T, -1), torch.softmax(given["teacher"] / T, -1)
    return (given["coefficients"] * T**2 * divergence_by_the_book(*cells_of(p, q), kind)).sum()


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("kind", ALL)
def test_value_and_gradients_are_the_formulas(kind: Divergence, T: float, transform: LogitTransform) -> None:
    given = problem()
    exact = {name: values.detach().double().requires_grad_(values.requires_grad) for name, values in given.items()}
    theirs = reference(exact, lambda p, q: (p, q), transform, T, kind)
    ours = soft_target_loss(
        given["hidden"],
        Head(weight=given["weight"], bias=given["bias"], transform=transform),
        lambda start, stop: Cells(log_probs=torch.log_softmax(given["teacher"][start:stop] / T, -1)),
        given["coefficients"],
        temperature=T,
        divergence=kind,
    )
    assert_same(ours, theirs)
    for one, other in zip(gradients(3 * ours, given), gradients(3 * theirs, exact), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("kind", ALL)
def test_a_tail_is_one_cell_of_both(kind: Divergence) -> None:
    given, k = problem(1), 6
    exact = {name: values.detach().double().requires_grad_(values.requires_grad) for name, values in given.items()}
    ids = given["teacher"].topk(k).indices

    def lumped(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(1, keepdim=True)], 1) for x in (p, q))

    stored = torch.softmax(given["teacher"], -1).gather(1, ids)
    cells = torch.cat([stored, 1 - stored.sum(1, keepdim=True)], 1).log()
    theirs = reference(exact, lumped, LogitTransform(), 1.0, kind)
    ours = soft_target_loss(
        given["hidden"],
        Head(weight=given["weight"], bias=given["bias"]),
        lambda start, stop: Cells(log_probs=cells[start:stop], ids=ids[start:stop]),
        given["coefficients"],
        divergence=kind,
    )
    assert_same(ours, theirs)
    for one, other in zip(gradients(ours, given), gradients(theirs, exact), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("kind", ["forward", "js"])
def test_a_teacher_without_tail_is_one_that_never_says_other_tokens(kind: Divergence) -> None:
    given, k = problem(2), 6
    exact = {name: values.detach().double().requires_grad_(values.requires_grad) for name, values in given.items()}
    ids = given["teacher"].topk(k).indices

    def renormalised(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.zeros_like(p).scatter(1, ids, p.gather(1, ids))
        return kept / kept.sum(1, keepdim=True), q

    of_stored = torch.log_softmax(given["teacher"].gather(1, ids), -1)
    cells = torch.cat([of_stored, torch.full((POSITIONS, 1), -torch.inf)], 1)
    # JS over single tokens and over the lumped tail are the same only because the teacher's tail is zero
    theirs = reference(exact, renormalised, LogitTransform(), 1.0, kind)
    ours = soft_target_loss(
        given["hidden"],
        Head(weight=given["weight"], bias=given["bias"]),
        lambda start, stop: Cells(log_probs=cells[start:stop], ids=ids[start:stop]),
        given["coefficients"],
        divergence=kind,
    )
    assert_same(ours, theirs)
    for one, other in zip(gradients(ours, given), gradients(theirs, exact), strict=True):
        assert_same(one, other)


def test_padded_columns_do_not_count() -> None:
    given, columns = problem(3), VOCAB - 7
    head = Head(weight=given["weight"], bias=given["bias"], columns=columns)
    log_p = torch.log_softmax(given["teacher"][:, :columns], -1)
    ours = soft_target_loss(given["hidden"], head, lambda a, b: Cells(log_probs=log_p[a:b]), given["coefficients"])
    cut = Head(weight=given["weight"][:columns], bias=given["bias"][:columns])
    theirs = soft_target_loss(given["hidden"], cut, lambda a, b: Cells(log_probs=log_p[a:b]), given["coefficients"])
    torch.testing.assert_close(ours, theirs)
    of_weight = gradients(ours, given)[1]
    assert not of_weight[columns:].any()
    assert of_weight[:columns].abs().sum(1).all()


def test_hot_softmaxes_match_logits() -> None:
    """Hinton et al. 2015, section 2.1: for large T and centred logits the gradient by z is c (z - v) / vocab."""
    generator = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(2, POSITIONS, VOCAB, generator=generator, dtype=torch.float64)
    student, teacher = (each - each.mean(1, keepdim=True) for each in (student, teacher))
    T = 1e3
    cells = Cells(log_probs=torch.log_softmax(teacher / T, -1))
    gradient = student / T
    subject.divergence_of(gradient, cells, "forward")
    # T² D has T times the gradient of D by z / T
    torch.testing.assert_close(gradient * T, (student - teacher) / VOCAB, rtol=1e-2, atol=1e-4)


def test_nothing_is_computed_again_in_the_backward_pass() -> None:
    given = problem(5)
    head = Head(weight=given["weight"].detach(), bias=given["bias"].detach())
    asked: list[int] = []

    def targets(start: int, stop: int) -> Cells:
        asked.append(start)
        return Cells(log_probs=torch.log_softmax(given["teacher"][start:stop], -1))

    loss = soft_target_loss(given["hidden"], head, targets, given["coefficients"])
    (with_frozen,) = torch.autograd.grad(loss, [given["hidden"]])
    assert len(asked) == -(-POSITIONS // 5)
    trained = soft_target_loss(
        given["hidden"], Head(weight=given["weight"], bias=given["bias"]), targets, given["coefficients"]
    )
    assert torch.equal(with_frozen, gradients(trained, given)[0])
    assert len(asked) == 2 * -(-POSITIONS // 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_passes_over_a_kept_graph_do_not_know_of_each_other(dtype: torch.dtype) -> None:
    given = {
        name: values.detach().to(dtype).requires_grad_(values.requires_grad) for name, values in problem(9).items()
    }

    def loss() -> Tensor:
        return soft_target_loss(
            given["hidden"],
            Head(weight=given["weight"], bias=given["bias"]),
            lambda start, stop: Cells(log_probs=torch.log_softmax(given["teacher"][start:stop].float(), -1)),
            given["coefficients"].float(),
        )

    wanted = ("hidden", "weight", "bias")
    alone = {factor: gradients(factor * loss(), given) for factor in (0.0, 3.0, -0.7)}
    kept, found = loss(), []
    for factor in (0.0, 3.0, -0.7):
        found.append(torch.autograd.grad(factor * kept, [given[name] for name in wanted], retain_graph=True))
    found.append(torch.autograd.grad(3.0 * kept, [given[name] for name in wanted]))
    for factor, several in zip((0.0, 3.0, -0.7, 3.0), found, strict=True):
        for one, other in zip(several, alone[factor], strict=True):
            assert torch.equal(one, other)
    for one, other in zip(found[1], found[3], strict=True):
        assert one.data_ptr() != other.data_ptr()
    with pytest.raises(RuntimeError, match="second time"):
        gradients(kept, given)


@pytest.mark.parametrize("kept", [False, True])
def test_a_heads_gradient_exists_once_unless_the_graph_is_kept(kept: bool) -> None:
    given = problem(10)
    head = Head(weight=given["weight"], bias=given["bias"])
    log_p = torch.log_softmax(given["teacher"], -1)
    loss = soft_target_loss(given["hidden"], head, lambda a, b: Cells(log_probs=log_p[a:b]), given["coefficients"])
    (saved,) = (
        each.data_ptr()
        for each in loss.grad_fn.saved_tensors  # type: ignore[union-attr]
        if each.shape == given["weight"].shape
    )
    (2 * loss).backward(retain_graph=kept)
    assert given["weight"].grad is not None
    assert (given["weight"].grad.data_ptr() == saved) is not kept


def test_a_bfloat16_head_gets_its_gradient_to_the_precision_of_its_dtype() -> None:
    given = problem(6)
    exact = {name: values.detach().double().requires_grad_(values.requires_grad) for name, values in given.items()}
    theirs = gradients(reference(exact, lambda p, q: (p, q), LogitTransform(), 1.0, "forward"), exact)
    low = {name: given[name].detach().bfloat16().requires_grad_() for name in ("hidden", "weight", "bias")}
    ours = soft_target_loss(
        low["hidden"],
        Head(weight=low["weight"], bias=low["bias"]),
        lambda start, stop: Cells(log_probs=torch.log_softmax(given["teacher"][start:stop], -1)),
        given["coefficients"],
    )
    for one, other in zip(gradients(ours, low), theirs, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() < 0.02 * other.norm()


def test_a_float16_sum_that_a_scale_would_keep_in_range_does_not_overflow() -> None:
    """Gradients are made before the loss's scale is known."""
    generator = torch.Generator().manual_seed(7)
    states = torch.randn(300, HIDDEN, generator=generator)
    states[:, 0] = 150.0
    weight = (0.02 * torch.randn(VOCAB, HIDDEN, generator=generator)).requires_grad_()
    log_p = torch.full((300, VOCAB), -1e4)
    log_p[:, 7] = 0.0
    head = Head(weight=weight, operands=torch.float16)
    loss = soft_target_loss(states, head, lambda a, b: Cells(log_probs=log_p[a:b]), torch.ones(300), temperature=2.0)
    (found,) = torch.autograd.grad(loss / 300, [weight])
    exact = weight.detach().double().requires_grad_()
    log_q = torch.log_softmax(states.double() @ exact.T / 2, -1)
    (theirs,) = torch.autograd.grad(-4 * log_q[:, 7].mean(), [exact])
    assert (found.double() - theirs).norm() < 0.01 * theirs.norm()


def test_no_positions_have_no_loss_and_gradients_of_zero() -> None:
    given = problem(11)
    head = Head(weight=given["weight"], bias=given["bias"])
    nothing = Cells(log_probs=torch.empty(0, VOCAB))
    loss = soft_target_loss(given["hidden"][:0], head, lambda a, b: nothing, given["coefficients"][:0])
    loss.backward()
    assert loss == 0
    assert all(given[name].grad is not None and not given[name].grad.any() for name in ("hidden", "weight", "bias"))


def test_a_head_of_another_dtype_than_the_states_is_converted() -> None:
    given = problem(8)
    head = Head(weight=given["weight"].detach().bfloat16())
    log_p = torch.log_softmax(given["teacher"], -1)
    loss = soft_target_loss(given["hidden"], head, lambda a, b: Cells(log_probs=log_p[a:b]), given["coefficients"])
    logits = given["hidden"].double() @ head.weight.double().T
    theirs = (given["coefficients"].double() * (log_p.exp() * (log_p - torch.log_softmax(logits, -1))).sum(-1)).sum()
    torch.testing.assert_close(loss.double(), theirs, rtol=1e-5, atol=1e-6)
