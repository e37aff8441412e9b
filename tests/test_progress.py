"""Progress where no terminal shows a bar: a line a minute."""

import numpy as np
import pytest

from distill_sampler import RankSurprisalRatio, ScoredDataset, Scorer, progress
from distill_sampler.progress import Lines
from tests import tiny


class Clock:
    """Seconds as the test wants them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_line_a_minute_tells_how_far_the_work_is() -> None:
    said: list[str] = []
    clock = Clock()
    with Lines("Scoring", total=1000, unit="rows", say=said.append, clock=clock) as lines:
        for _ in range(180):  # two rows a second
            clock.now += 1
            lines.update(2)
    assert said == [
        "Scoring: 12%, 120 rows, 2 rows/s, 1 min so far, about 7 min left",
        "Scoring: 24%, 240 rows, 2 rows/s, 2 min so far, about 6 min left",
        "Scoring: 36%, 360 rows, 2 rows/s, 3 min so far, about 5 min left",
    ]


def test_short_work_and_disabled_progress_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    with Lines("Scoring", say=said.append) as lines:
        lines.update()
    with progress.progress_of("Scoring", disable=True) as bar:
        bar.update(3)
    assert (said, capsys.readouterr().err) == ([], "")


def test_a_scoring_pass_speaks_in_files_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    dataset = ScoredDataset(tiny.tokenised(tiny.candidates(2), tiny.tokenizer()))
    for _ in Scorer().score(tiny.model(), dataset, [RankSurprisalRatio()], np.arange(len(dataset))):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert lines[-1].startswith("Scoring: 100%, ")
    assert all("\r" not in line for line in lines)
