"""What is measured on held-out prompts, on numbers that can be checked by hand."""

import pytest

from distill_sampler.compare.measures import HUMAN, Answer, balanced_loss, gains, losses_by_teacher, measured, ranking


def answer(prompt: str, teacher: str, correct: bool | None, loss: float) -> Answer:
    return Answer(prompt=prompt, teacher=teacher, correct=correct, loss=loss)


ANSWERS = [
    answer("p", "a", True, 1.0),
    answer("p", "b", True, 3.0),
    answer("q", "a", True, 2.0),
    answer("q", "b", False, 1.5),
    answer("r", "b", False, 9.0),
    answer("p", HUMAN, True, 7.0),
]


def test_each_teacher_counts_equally_although_one_has_fewer_correct_answers() -> None:
    of_prompt = balanced_loss(ANSWERS)
    assert set(of_prompt) == {"p", "q"}  # nobody answered r correctly
    assert sum(of_prompt.values()) / 2 == pytest.approx((1.5 + 3.0) / 2)  # a: mean of 1 and 2; b: 3
    assert losses_by_teacher(ANSWERS) == {"a": 1.5, "b": 3.0}


def test_ranking_compares_answers_of_both_kinds_to_one_prompt() -> None:
    assert ranking(ANSWERS) == {"q": 0.0}
    assert ranking([*ANSWERS, answer("q", "c", True, 1.0), answer("q", "d", True, 1.5)]) == {"q": 0.5}


def test_answers_that_nobody_judged_all_count() -> None:
    answers = [answer("p", "a", None, 1.0), answer("p", "b", None, 2.0)]
    assert measured(answers) == {"loss": {"p": 1.5}}


def test_a_gain_is_positive_where_the_arm_is_better() -> None:
    assert gains("loss", {"p": 1.0, "q": 2.0}, {"p": 1.5, "r": 0.0}).tolist() == [0.5]
    assert gains("ranking", {"p": 1.0}, {"p": 0.5}).tolist() == [0.5]
    assert measured(ANSWERS)["human"] == {"p": 7.0}
