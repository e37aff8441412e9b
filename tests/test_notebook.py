"""What a notebook shows of a run."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from distill_sampler import BestOf, Curriculum, RankSurprisalRatio, ScoredDataset, Scorer, Shuffle
from distill_sampler.report.progress import progress
from tests import tiny

RSR = "rank_surprisal_ratio"


@pytest.fixture
def run(dataset: ScoredDataset, model: PreTrainedModel) -> Curriculum:
    curriculum = Curriculum(
        metrics=[RankSurprisalRatio()],
        policies=[BestOf(RSR, per="prompt_id"), Shuffle()],
        scorer=Scorer(progress=False),
    )
    curriculum.bind(dataset)
    for epoch in range(3):
        curriculum.start_epoch(epoch, tiny.model(seed=epoch), step=10 * epoch)
    return curriculum


def test_history_and_samples_name_prompt_and_teacher_and_say_what_was_chosen(run: Curriculum) -> None:
    samples, history = run.samples(), run.history()
    for table in (samples, history):
        assert {"prompt_id", "teacher", "chosen", RSR} <= set(table.column_names)
    assert samples["sample"].filter(samples["chosen"]).to_pylist() == sorted(run.plans[-1].indices)
    for epoch, plan in enumerate(run.plans):
        chosen = [row["sample"] for row in history.to_pylist() if row["epoch"] == epoch and row["chosen"]]
        assert chosen == sorted(plan.indices)
    run.score(tiny.model(seed=9), epoch=3, step=30)  # nothing is planned from this pass
    assert [row["chosen"] for row in run.history().to_pylist() if row["epoch"] == 3] == [None] * 18
    assert run.history("teacher").column_names[:3] == ["sample", "teacher", "pass"]


def test_curriculum_plan_and_scores_show_themselves(run: Curriculum) -> None:
    assert repr(run) == (
        "Curriculum(metrics=[RankSurprisalRatio()], policies=[BestOf('rank_surprisal_ratio', per='prompt_id'), "
        "Shuffle()]), epoch 2, 6 of 18 samples an epoch"
    )
    assert "not attached" in repr(Curriculum(metrics=[], policies=[]))
    assert repr(run.plans[-1]) == f"EpochPlan(6 samples, 6 distinct, {run.plans[-1].fingerprint})"
    assert repr(run.store).startswith("ScoreStore(18 samples, 18 scored")
    for item in (run, run.plans[-1], run.store, run.cycle.scores()):
        html: str = item._repr_html_()  # type: ignore[attr-defined]
        assert html.count("<table>") == html.count("</table>") == 1
    assert "<td style='text-align:left'>ada</td>" in run._repr_html_()


def test_hostile_names_stay_text(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    rows = [{**row, "teacher": "<script>alert(1)</script>"} for row in dataset.rows]
    curriculum = Curriculum(metrics=[RankSurprisalRatio()], policies=[Shuffle()], scorer=Scorer(progress=False))
    curriculum.bind(ScoredDataset(rows, end_token_ids=[257]))
    curriculum.start_epoch(0, model)
    assert "<script>" not in curriculum._repr_html_()
    assert "<script>alert" not in curriculum.plot().to_json()


def test_progress_follows_means_shares_and_ages(run: Curriculum) -> None:
    found = progress(run.cycle.scores())
    assert found["epochs"] == [0, 1, 2]
    for epoch, plan in enumerate(run.plans):
        scores = run.cycle.scores_after(epoch + 1)[RSR]
        assert found["chosen"][epoch] == pytest.approx(scores[plan.indices].mean(), abs=1e-3)
        assert found["candidates"][epoch] == pytest.approx(scores.mean(), abs=1e-3)
        assert sum(found["shares"][epoch]) == 6
    assert [ages["max"] for ages in found["ages"]] == [0, 0, 0]  # everything is scored before every epoch
    assert len(found["curves"]) == 18


def test_the_picture_has_a_line_for_every_curve(run: Curriculum) -> None:
    picture = run.plot()
    names: list[Any] = [trace.name for trace in picture.data]
    assert names[:2] == ["candidates", "chosen"]
    assert len([name for name in names if name.startswith("sample ")]) == 18
    assert {"ada", "bob", "cy", "median age", "max age"} <= set(names)
    with pytest.raises(ValueError, match="There is no metric 'lark'"):
        run.plot("lark")
    empty = Curriculum(metrics=[RankSurprisalRatio()], policies=[Shuffle()])
    empty.bind(run.dataset)
    with pytest.raises(ValueError, match="Nothing has been scored"):
        empty.plot()


def test_the_recipes_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads((Path(__file__).parents[1] / "recipes" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells)  # it is kept without its outputs
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), names)
        if last is not None:
            assert isinstance(last, ast.Expr)
            shown.append(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names))
    assert [type(each).__name__ for each in shown].count("Curriculum") == 4
    assert (tmp_path / "run.html").exists()
    assert (tmp_path / "notebook-run" / "report.html").exists()
