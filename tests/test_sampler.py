"""Replaying a plan, at constant length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from distill_sampler import DistillSampler, EpochPlan
from distill_sampler.planning.sampler import fit_length


def test_the_sampler_yields_the_plan_and_has_its_length() -> None:
    sampler = DistillSampler(4)
    sampler.set_plan(EpochPlan(indices=np.array([3, 1, 1, 0])))
    assert (list(sampler), len(sampler)) == ([3, 1, 1, 0], 4)
    assert [batch.tolist() for batch in DataLoader(range(5), batch_size=2, sampler=sampler)] == [[3, 1], [1, 0]]


def test_a_new_plan_does_not_disturb_an_iteration_under_way() -> None:
    sampler = DistillSampler(2)
    sampler.set_plan(EpochPlan(indices=np.array([0, 1])))
    iterator = iter(sampler)
    next(iterator)
    sampler.set_plan(EpochPlan(indices=np.array([5, 6])))
    assert next(iterator) == 1


def test_iterating_before_there_is_a_plan_says_what_to_call() -> None:
    with pytest.raises(ValueError, match="start_epoch"):
        list(DistillSampler(2))


@given(given=st.integers(1, 50), wanted=st.integers(1, 120))
def test_no_sample_is_repeated_more_than_needed(given: int, wanted: int) -> None:
    plan = EpochPlan(indices=np.arange(given) + 7)
    fitted = fit_length(plan, wanted)
    counts = np.bincount(fitted.indices, minlength=given + 7)[7:]
    assert len(fitted) == wanted
    assert counts.max() - counts.min() <= 1
    assert fitted.indices[:given].tolist() == plan.indices[:wanted].tolist()
    assert fitted.weights.mean() == pytest.approx(1)


def test_a_plan_is_immutable_and_known_by_its_content() -> None:
    indices = np.array([2, 0, 1])
    plan = EpochPlan(indices=indices)
    indices[0] = 9
    assert plan.indices.tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="read-only"):
        plan.indices[0] = 9
    assert plan == EpochPlan(indices=np.array([2, 0, 1]))
    assert plan.fingerprint == EpochPlan(indices=np.array([2, 0, 1])).fingerprint
    assert plan.fingerprint != EpochPlan(indices=np.array([2, 1, 0])).fingerprint
    assert plan.fingerprint != EpochPlan(indices=np.array([2, 0, 1]), weights=np.array([0.5, 1, 1.5])).fingerprint
