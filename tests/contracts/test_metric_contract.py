"""What a metric may do and what is refused: columns, abstaining, readers, statistics, names."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from distill_sampler import (
    BestOf,
    Curriculum,
    KeepTop,
    Metric,
    ModelReader,
    RankSurprisalRatio,
    Reader,
    ScoredDataset,
    Scorer,
    Shuffle,
    SortBy,
)
from distill_sampler.artifacts.kept_readings import load_readings, save_readings
from distill_sampler.protocols import PassInfo
from distill_sampler.reading.readings import Readings
from distill_sampler.types import Missing, Sample, TokenStats, View
from tests import tiny

RSR = "rank_surprisal_ratio"


@dataclass(frozen=True, kw_only=True)
class Difficulty(Metric):
    """A metric in a few lines: it reads a column of the data set, and does not apply where that has no value."""

    name: str = "difficulty"

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return ("level",)

    def views(self, sample: Sample) -> Sequence[View] | None:
        return None if sample.columns["level"] is None else ()

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        return {self.name: float(sample.columns["level"])}


@dataclass(frozen=True, kw_only=True)
class Loose(Metric):
    """Returns what it is told to."""

    name: str = "loose"
    numbers: Any = field(default_factory=dict)

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Any:
        return self.numbers


class Counting(Reader):
    """A frozen reader without a model: the surprisal of a token is its id. It counts the views that it has read."""

    def __init__(self, name: str = "counting") -> None:
        self.name = name
        self.read = 0

    @property
    def identity(self) -> str:
        return self.name

    @contextmanager
    def open(self, info: PassInfo) -> Any:
        def read(views: Sequence[View]) -> list[TokenStats]:
            self.read += len(views)
            return [TokenStats(surprisal=view.input_ids[view.scored].astype(np.float32)) for view in views]

        yield read


@dataclass(frozen=True, kw_only=True)
class Gap(Metric):
    """Mean surprisal under the student, less that under another reader."""

    teacher: Any
    name: str = "gap"

    @property
    def readers(self) -> Mapping[str, Reader]:
        return {"teacher": self.teacher}

    def views(self, sample: Sample) -> Sequence[View]:
        return tuple(
            View(input_ids=sample.input_ids, scored=sample.scored, reader=reader) for reader in ("student", "teacher")
        )

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        student, teacher = stats
        return {self.name: float(student.surprisal.mean() - teacher.surprisal.mean())}


def with_level(levels: Sequence[float | None], first: int = 0) -> ScoredDataset:
    rows = tiny.tokenised(tiny.candidates(6), tiny.tokenizer())
    return ScoredDataset(rows.add_column("level", list(levels)), end_token_ids=[257])  # type: ignore[call-arg]


LEVELS = [None if n % 3 == 0 else float(n) for n in range(18)]


def bound(dataset: ScoredDataset, *metrics: Metric, **changes: Any) -> Curriculum:
    settings: dict[str, Any] = {"policies": [Shuffle()], "scorer": Scorer(progress=False), **changes}
    curriculum = Curriculum(metrics=list(metrics), **settings)
    curriculum.bind(dataset)
    return curriculum


# ---- Columns and abstaining ----


def test_a_metric_reads_columns_of_the_data_set(model: PreTrainedModel) -> None:
    curriculum = bound(with_level(LEVELS), Difficulty())
    curriculum.start_epoch(0, model)
    expected = [np.nan if level is None else level for level in LEVELS]
    np.testing.assert_array_equal(curriculum.store.latest["difficulty"], np.array(expected, np.float32))


def test_a_metric_that_does_not_apply_is_never_called_nan(model: PreTrainedModel) -> None:
    curriculum = bound(with_level(LEVELS), Difficulty(), RankSurprisalRatio(), policies=[KeepTop("difficulty", num=12)])
    curriculum.start_epoch(0, model)
    (summary,) = curriculum.summaries
    assert summary.scoring.not_applicable == {"difficulty": 6}
    assert len(summary.scoring.non_finite) == len(summary.scoring.too_long) == 0
    assert any("difficulty does not apply to 6 samples" in note for note in summary.notes)
    assert not any("NaN" in note for note in summary.notes)
    assert np.isfinite(curriculum.store.latest[RSR]).all()  # the other metric has its score
    said = curriculum.explain(0, 0)
    assert "it has no difficulty (the metric does not apply to it)" in said


def test_a_score_of_nan_counts_as_not_applicable(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    (scored,) = Scorer(progress=False).score(model, dataset, [Loose(numbers={"loose": np.nan})], np.arange(4))
    assert (scored.missing["loose"] == Missing.NOT_APPLICABLE).all()
    (scored,) = Scorer(progress=False).score(model, dataset, [Loose(numbers=None)], np.arange(4))
    assert sorted(scored.not_applicable.tolist()) == [0, 1, 2, 3]


def test_a_student_with_nan_weights_is_called_so(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    model.model.norm.weight.data.fill_(np.nan)
    (scored,) = Scorer(progress=False).score(model, dataset, [RankSurprisalRatio()], np.arange(4))
    assert (scored.missing[RSR] == Missing.NON_FINITE).all()
    assert len(scored.not_applicable) == 0


def test_why_there_is_no_score_survives_an_interruption_and_a_resume(model: PreTrainedModel, tmp_path: Path) -> None:
    dataset = with_level(LEVELS)
    curriculum = bound(dataset, Difficulty())
    curriculum.keep(tmp_path, run="a")
    curriculum.start_epoch(0, model)
    again = bound(dataset, Difficulty())
    again.keep(tmp_path, run="a")
    again.start_epoch(0, model)  # takes up the parts of the pass
    resumed = bound(dataset, Difficulty())
    resumed.load_state_dict(curriculum.state_dict())
    for other in (again, resumed):
        np.testing.assert_array_equal(other.store.missing["difficulty"], curriculum.store.missing["difficulty"])


def test_another_column_is_refused_on_a_resume(model: PreTrainedModel) -> None:
    curriculum = bound(with_level(LEVELS), Difficulty())
    curriculum.start_epoch(0, model)
    other = bound(with_level([*LEVELS[1:], None]), Difficulty())
    with pytest.raises(ValueError, match=r"column 'level'.*accept_changes=True"):
        other.load_state_dict(curriculum.state_dict())
    other.load_state_dict(curriculum.state_dict(), accept_changes=True)
    assert np.isnan(other.store.latest["difficulty"]).all()  # scores of the old column are not taken over


def test_permuted_prompt_ids_are_refused_on_a_resume(model: PreTrainedModel) -> None:
    rows = tiny.tokenised(tiny.candidates(6), tiny.tokenizer())
    permuted = rows.remove_columns("prompt_id").add_column("prompt_id", rows["prompt_id"][::-1])
    first, second = (
        bound(ScoredDataset(r, end_token_ids=[257]), RankSurprisalRatio(), policies=[BestOf(RSR, per="prompt_id")])
        for r in (rows, permuted)
    )
    first.start_epoch(0, model)
    with pytest.raises(ValueError, match="column 'prompt_id'"):
        second.load_state_dict(first.state_dict())


def test_a_column_that_is_not_there_is_refused_with_those_that_are(dataset: ScoredDataset) -> None:
    with pytest.raises(ValueError, match=r"There is no column 'level'; those in the data set: .*'prompt_id'"):
        bound(dataset, Difficulty())


# ---- What reduce returns ----


@pytest.mark.parametrize("numbers", [{"loosely": 1.0}, {}, {"loose": 1.0, "more": 2.0}])
def test_reduce_returns_its_columns_or_is_refused(numbers: Any, model: PreTrainedModel, dataset: ScoredDataset) -> None:
    with pytest.raises(ValueError, match=r"Loose\.reduce returned .* its columns are 'loose'"):
        next(Scorer(progress=False).score(model, dataset, [Loose(numbers=numbers)], np.arange(1)))


# ---- Readers ----


def test_what_a_frozen_reader_gave_is_never_read_again(dataset: ScoredDataset) -> None:
    teacher = Counting()
    curriculum = bound(dataset, Gap(teacher=teacher))
    for epoch in range(3):
        curriculum.start_epoch(epoch, tiny.model(seed=epoch), step=epoch)
    assert teacher.read == 18
    gaps = [taken.columns["gap"] for taken in curriculum.cycle.record.passes]
    assert not np.allclose(gaps[0], gaps[1])  # the student's side was read anew
    (tokens,) = {tuple(summary.scoring.tokens_of) for summary in curriculum.summaries}
    assert tokens == ("gap",)


def test_two_readers_give_what_each_gives_alone(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    other = tiny.model(seed=7)
    metric = Gap(teacher=ModelReader(other, share_prompts=False))
    scorer = Scorer(progress=False, share_prompts=False)
    (scored,) = scorer.score(model, dataset, [metric], np.arange(18))
    means = []
    for one in (model, other):
        (alone,) = scorer.score(one, dataset, [RankSurprisalRatio()], np.arange(18))
        assert alone.indices.tolist() == scored.indices.tolist()
        means.append(alone.columns["mean_surprisal"])
    np.testing.assert_allclose(scored.columns["gap"], means[0] - means[1], atol=1e-4)
    assert scored.tokens == 2 * int(dataset.lengths.sum())


def test_another_teacher_is_refused_on_a_resume(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    curriculum = bound(dataset, Gap(teacher=Counting("one")))
    curriculum.start_epoch(0, model)
    bound(dataset, Gap(teacher=Counting("one"))).load_state_dict(curriculum.state_dict())
    with pytest.raises(ValueError, match=r"metrics.*<one>.*<two>"):
        bound(dataset, Gap(teacher=Counting("two"))).load_state_dict(curriculum.state_dict())


def kept_in(folder: Path, dataset: ScoredDataset, teacher: Reader, **changes: Any) -> Curriculum:
    curriculum = bound(dataset, Gap(teacher=teacher), **changes)
    curriculum.keep(folder, run="one")
    return curriculum


def test_what_a_frozen_reader_gave_survives_the_process(
    dataset: ScoredDataset, model: PreTrainedModel, tmp_path: Path
) -> None:
    first = kept_in(tmp_path, dataset, Counting())
    first.score(model, epoch=0, step=0, which=np.arange(5))
    for number in (0, 1):  # another process each time; the second reads only what none has read
        teacher = Counting()
        later = kept_in(tmp_path, dataset, teacher)
        later.start_epoch(0, model, step=1 + number)
        assert teacher.read == (len(dataset) - 5 if number == 0 else 0)
        np.testing.assert_array_equal(later.store.latest["gap"][:5], first.store.latest["gap"][:5])
        assert np.isfinite(later.store.latest["gap"]).all()
    other = Counting("another")
    kept_in(tmp_path, dataset, other).start_epoch(0, model, step=9)
    assert other.read == len(dataset)


def test_a_damaged_file_of_readings_is_passed_over_and_read_again(
    dataset: ScoredDataset, model: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept_in(tmp_path, dataset, Counting()).start_epoch(0, model)
    (path,) = (tmp_path / "distill_sampler" / "readings").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    teacher = Counting()
    kept_in(tmp_path, dataset, teacher).start_epoch(0, model, step=1)
    assert teacher.read == len(dataset)
    assert "so they read it again" in caplog.text


def test_statistics_of_readings_come_back_bit_for_bit(tmp_path: Path) -> None:
    given = Readings()
    stats = {
        "whole": TokenStats(surprisal=np.array([0.1, 2.5], np.float32), rank=np.array([1, 7]), ties=np.array([0, 2])),
        "half": TokenStats(surprisal=np.array([0.3], np.float32), rank=np.array([1.5], np.float32), cost=3.0),
        "none": TokenStats(surprisal=np.zeros(0, np.float32), entropy=np.zeros(0, np.float32)),
    }
    given.keep([(("reader", name.encode()), one) for name, one in stats.items()])
    save_readings(given, tmp_path)
    save_readings(given, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1  # nothing is new the second time
    found = Readings()
    load_readings(found, tmp_path, {"reader"})
    for name, one in stats.items():
        again = found.get(("reader", name.encode()), ())
        assert again is not None
        for each in ("surprisal", "rank", "ties", "entropy"):
            np.testing.assert_array_equal(getattr(again, each), getattr(one, each))
    assert found.take_unsaved() == []
    empty = Readings()
    load_readings(empty, tmp_path, {"another"})
    assert len(empty) == 0


def test_a_frozen_model_is_known_by_its_weights() -> None:
    first, second = tiny.model(), tiny.model()
    assert ModelReader(first).identity == ModelReader(second).identity
    second.lm_head.weight.data[3, 5] += 1e-3
    assert ModelReader(first).identity != ModelReader(second).identity


def test_a_reader_that_the_metric_does_not_have_is_refused(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    class Nameless(Gap):
        @property
        def readers(self) -> Mapping[str, Reader]:
            return {}

    with pytest.raises(ValueError, match=r"names the reader 'teacher', but its readers are 'student'"):
        next(Scorer(progress=False).score(model, dataset, [Nameless(teacher=None)], np.arange(1)))


def test_a_metric_with_another_reader_cannot_be_observed(dataset: ScoredDataset) -> None:
    with pytest.raises(ValueError, match="observe=True: gap"):
        Curriculum(metrics=[Gap(teacher=Counting())], policies=[Shuffle()], observe=True).bind(dataset, observes=True)


# ---- What is no metric ----


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([RankSurprisalRatio], r"the class RankSurprisalRatio\. Write RankSurprisalRatio\(\)"),
        (["rank_surprisal_ratio"], r"the text 'rank_surprisal_ratio'"),
        (RankSurprisalRatio(), r"metrics= takes a list"),
        ([len], r"metrics= was given the function len.*subclass distill_sampler\.Metric"),
        ([Loose(name=None)], r"Loose\.name must be text"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_metric_is_refused_with_the_cure(metrics: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curriculum(metrics=metrics, policies=[])


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ([Shuffle], r"the class Shuffle\. Write Shuffle\(\)"),
        (Shuffle(), r"policies= takes a list"),
        (["Shuffle"], r"the text 'Shuffle'"),
        ([lambda plan, pool, rng: plan], r"function <lambda>.*subclass distill_sampler\.Policy"),
        ([BestOf(RankSurprisalRatio(), per="prompt_id")], r"'rank_surprisal_ratio'"),  # type: ignore[arg-type]
        ([BestOf(RSR, per="prompt_id", k=1.5)], r"BestOf\(k=1\.5\): k takes a whole number"),  # type: ignore[arg-type]
        ([SortBy(RSR, best_first="no")], r"SortBy\(best_first='no'\): best_first takes True or False"),  # type: ignore[arg-type]
        ([BestOf(RSR, per=3)], r"BestOf\(per=3\): per takes text"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_policy_is_refused_with_the_cure(policies: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curriculum(metrics=[RankSurprisalRatio()], policies=policies)
