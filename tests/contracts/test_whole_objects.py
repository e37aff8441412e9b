"""Nothing is half made: before `bind` there is a sentence, and everything public can be pickled."""

import inspect
import pickle
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

import distill_sampler
from distill_sampler import (
    BestOf,
    Curriculum,
    EpochPlan,
    GlobalNaturalness,
    KeepCorrect,
    LocalNaturalness,
    RankSurprisalRatio,
    Rescore,
    SampleBySoftmax,
    ScoredDataset,
    Scorer,
    Shuffle,
    WeightBySoftmax,
)
from tests import tiny
from tests.contracts.test_one_why import LISTS

RSR = "rank_surprisal_ratio"
BEFORE_BIND = {
    "use_tokenizer",
    "bind",
    "driven_by",
    "metrics",
    "policies",
    "rescore",
    "observe",
    "seed",
    "scorer",
    "teacher",
    "domain",
}
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "start_epoch": (0, None),
    "replan": (None,),
    "score": (None,),
    "progress": (3,),
    "explain": (0, 0),
    "keep": ("somewhere",),
    "save_run": ("somewhere",),
    "merge_observed": (None,),
    "load_state_dict": ({},),
}
NAMED: dict[str, dict[str, Any]] = {
    "replan": {"step": 1, "into_epoch": 1, "start": 1},
    "score": {"epoch": 0, "step": 0},
}


def curriculum(**changes: Any) -> Curriculum:
    settings = {
        "metrics": [RankSurprisalRatio()],
        "policies": [BestOf(RSR, per="prompt_id"), Shuffle()],
        "scorer": Scorer(progress=False),
        **changes,
    }
    return Curriculum(**settings)


@pytest.mark.parametrize(
    "name", sorted(name for name in dir(curriculum()) if not name.startswith("_") and name not in BEFORE_BIND)
)
def test_every_public_member_before_bind_answers_in_a_sentence(name: str) -> None:
    unbound = curriculum()

    def use() -> None:
        getattr(unbound, name)(*ARGUMENTS.get(name, ()), **NAMED.get(name, {}))

    with pytest.raises(ValueError, match=r"call attach\(trainer, curriculum\).*curriculum\.bind\(dataset\)"):
        use()


def test_a_loop_that_applies_no_weights_is_refused_them(dataset: ScoredDataset) -> None:
    weighing = curriculum(policies=[WeightBySoftmax(RSR, temperature=1.0)])
    with pytest.raises(ValueError, match=r"loss weights.*CurriculumLoop.*bind\(dataset, applies_weights=True\)"):
        weighing.bind(dataset)
    weighing.bind(dataset, applies_weights=True)


def test_a_loop_that_observes_nothing_is_refused_observed_scores(dataset: ScoredDataset) -> None:
    with pytest.raises(ValueError, match=r"observe=True: .*CurriculumLoop"):
        curriculum(observe=True).bind(dataset)


@pytest.mark.parametrize("name", distill_sampler.__all__)
def test_every_public_class_and_function_pickles(name: str) -> None:
    item = getattr(distill_sampler, name)
    assert pickle.loads(pickle.dumps(item)) is item


@pytest.mark.parametrize("policy", [policy for policies in LISTS.values() for policy in policies], ids=repr)
def test_every_policy_pickles(policy: Any) -> None:
    assert pickle.loads(pickle.dumps(policy)) == policy


def test_what_users_make_pickles_after_it_was_used(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    local = LocalNaturalness(tokenizer=tiny.tokenizer(), window=1, min_tokens=2)
    made = [
        local,
        GlobalNaturalness(),
        Rescore(every_steps=3),
        EpochPlan(indices=np.array([2, 0])),
        KeepCorrect("correct", if_none="drop"),
        SampleBySoftmax(RSR, temperature=1.0),
    ]
    scorer = Scorer(progress=False)
    list(scorer.score(model, dataset, [local, RankSurprisalRatio()], np.arange(18)))
    for item in (*made, scorer):
        assert pickle.loads(pickle.dumps(item)) == item
    bound = curriculum()
    bound.bind(dataset)
    plan = bound.start_epoch(0, model)
    copy = pickle.loads(pickle.dumps(bound))
    assert copy.sampler.plan == plan
    assert copy.explain(3, 0) == bound.explain(3, 0)
    assert copy.start_epoch(1, model, step=5) == bound.start_epoch(1, model, step=5)
    (scored,) = pickle.loads(pickle.dumps(list(scorer.score(model, dataset, [RankSurprisalRatio()], np.arange(2)))))
    assert len(scored.indices) == 2
    assert pickle.loads(pickle.dumps(dataset)).fingerprint == dataset.fingerprint
    assert pickle.loads(pickle.dumps(dataset.sample(3))).index == 3


def test_every_public_method_says_what_it_does() -> None:
    for name in distill_sampler.__all__:
        item = getattr(distill_sampler, name)
        for member, value in inspect.getmembers(item) if inspect.isclass(item) else ():
            if not member.startswith("_") and inspect.isfunction(value) and value.__module__.startswith("distill_"):
                assert inspect.getdoc(value), f"{name}.{member}"
