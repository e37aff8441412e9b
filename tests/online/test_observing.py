"""Scores out of the forwards of training: those that a scoring pass would have given for the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, TrainerCallback

from distill_sampler import (
    BestOf,
    Curriculum,
    GlobalNaturalness,
    LocalNaturalness,
    RankSurprisalRatio,
    Rescore,
    ResponseLength,
    ScoredDataset,
    Scorer,
    Shuffle,
    attach,
)
from tests import tiny
from tests.online.test_loss_weights import trainer_of
from tests.test_architectures import ARCHITECTURES, build

RSR = "rank_surprisal_ratio"
COLUMNS = ("mean_rank", "mean_surprisal", RSR, "response_length")


def observing(**changes: Any) -> Curriculum:
    settings: dict[str, Any] = {
        "metrics": [RankSurprisalRatio(), ResponseLength()],
        "policies": [Shuffle()],
        "observe": True,
        "rescore": Rescore.never(),
        "scorer": Scorer(progress=False),
        **changes,
    }
    return Curriculum(**settings)


class ScoresBefore(TrainerCallback):
    """Scores every sample actively before each step, at the very weights that the step's forward will have."""

    def __init__(self, trainer: Any, curriculum: Curriculum) -> None:
        self.trainer, self.curriculum = trainer, curriculum
        self.scores: list[dict[str, np.ndarray]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dataset, metrics = self.curriculum.dataset, list(self.curriculum.metrics.values())
        columns = {name: np.full(len(dataset), np.nan, np.float32) for name in COLUMNS}
        for scored in Scorer(progress=False).score(
            self.trainer.model_wrapped, dataset, metrics, np.arange(len(dataset))
        ):
            for name in COLUMNS:
                columns[name][scored.indices] = scored.columns[name]
        self.scores.append(columns)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Trainer": ("Trainer", {}),
    "Trainer, accumulation": ("Trainer", {"gradient_accumulation_steps": 2}),
    "SFTTrainer": ("SFTTrainer", {}),
    "SFTTrainer, padding-free": ("SFTTrainer", {"padding_free": True, "max_length": None}),
    "SFTTrainer, gradient checkpointing": ("SFTTrainer", {"gradient_checkpointing": True}),
    "SFTTrainer, LoRA": ("SFTTrainer", {"peft_config": LoraConfig(r=4, target_modules="all-linear")}),
    "SFTTrainer, adapter on the head": (
        "SFTTrainer",
        {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])},
    ),
    "SFTTrainer, workers and accumulation": (
        "SFTTrainer",
        {"dataloader_num_workers": 2, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_observed_scores_equal_those_of_a_scoring_pass(
    case: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    kind, changes = CASES[case]
    trainer = trainer_of(kind, tmp_path, tokenizer, **changes)
    curriculum = observing()
    attach(trainer, curriculum)
    active = ScoresBefore(trainer, curriculum)
    trainer.add_callback(active)
    trainer.train()
    seen = curriculum.store.observed
    assert sorted(curriculum.plans[0].indices.tolist()) == list(range(6))
    assert (seen.step >= 0).all()  # every sample that was trained on
    for name in COLUMNS:
        expected = [active.scores[step][name][sample] for sample, step in enumerate(seen.step)]
        np.testing.assert_allclose(seen.columns[name], expected, rtol=2e-5)
    assert len(np.unique(seen.columns["mean_surprisal"])) == 6


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_observing_changes_no_bit_of_training(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    runs = []
    for observe in (True, False):
        trainer = trainer_of(kind, tmp_path, tokenizer, model=tiny.model(attention_dropout=0.1), num_train_epochs=2)
        attach(trainer, observing(observe=observe))
        trainer.train()
        runs.append(trainer)
    losses = [[line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in runs]
    assert losses[0] == losses[1]
    for left, right in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_next_plan_uses_observed_scores(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of("SFTTrainer", tmp_path, tokenizer, num_train_epochs=3, per_device_train_batch_size=1)
    curriculum = observing(policies=[BestOf(RSR, per="prompt_id"), Shuffle()])
    attach(trainer, curriculum)
    trainer.train()
    first, second, third = curriculum.summaries
    assert (first.scoring.samples, second.scoring.samples, third.scoring.samples) == (6, 0, 0)
    assert (first.scoring.observed, second.scoring.observed) == (0, 2)
    assert second.scoring.estimated == 4
    trained = curriculum.plans[0].indices
    assert curriculum.cycle.record.passes[1].was_measured.nonzero()[0].tolist() == sorted(trained.tolist())
    # the others moved with the drift of those that were seen
    before, after = curriculum.cycle.scores_after(1), curriculum.cycle.scores_after(2)
    others = np.setdiff1d(np.arange(6), trained)
    shift = (after[RSR] - before[RSR])[trained].mean()
    np.testing.assert_allclose((after[RSR] - before[RSR])[others], shift, rtol=1e-4)
    assert not np.isclose(shift, 0)


def test_in_bfloat16_observed_scores_are_close_to_those_of_a_pass(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """bfloat16: the forward of training rounds as that of scoring, and the head's product is in float32 for both."""
    trainer = trainer_of("SFTTrainer", tmp_path, tokenizer, bf16=True, learning_rate=0.0)
    curriculum = observing()
    attach(trainer, curriculum)
    trainer.train()
    seen, scored = curriculum.store.observed.columns, curriculum.cycle.record.passes[0].columns
    np.testing.assert_allclose(seen["mean_surprisal"], scored["mean_surprisal"], rtol=0.01)
    np.testing.assert_allclose(seen[RSR], scored[RSR], rtol=0.05)
    assert curriculum.store.numerics["dtype"] == "bfloat16"


def test_observing_uses_the_tie_rule_of_the_scorer(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny.model()
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[1::2] = head.weight[: len(head.weight) - 1 : 2]  # every token has exactly one equal
    trainer = trainer_of("SFTTrainer", tmp_path, tokenizer, model=model, learning_rate=0.0)
    curriculum = observing(scorer=Scorer(ties="mid", progress=False))
    attach(trainer, curriculum)
    trainer.train()
    seen, scored = curriculum.store.observed.columns, curriculum.cycle.record.passes[0].columns
    assert (scored["mean_rank"] >= 1.5).all()
    np.testing.assert_allclose(seen["mean_rank"], scored["mean_rank"], rtol=2e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_observed_as_it_is_scored(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build(ARCHITECTURES[name])
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    trainer = trainer_of("Trainer", tmp_path, tokenizer, model=model, learning_rate=0.0)
    curriculum = observing()
    attach(trainer, curriculum)
    trainer.train()
    for column, values in curriculum.store.observed.columns.items():
        np.testing.assert_allclose(values, curriculum.cycle.record.passes[0].columns[column], rtol=1e-4)


def test_a_sample_without_finite_logits_has_no_score(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of("SFTTrainer", tmp_path, tokenizer, learning_rate=0.0, max_grad_norm=0.0)
    with_y, without = (set(trainer.train_dataset[row]["input_ids"]) for row in (2, 0))  # "cy: …" and "ada: …"
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[min(with_y - without)] = float("nan")
    curriculum = observing()
    attach(trainer, curriculum)

    class OneStep(TrainerCallback):
        """Afterwards, NaN gradients have spoilt the weights."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.model.zero_grad()

    trainer.add_callback(OneStep())
    trainer.train()
    seen, scored = curriculum.store.observed.columns[RSR], curriculum.cycle.record.passes[0].columns[RSR]
    np.testing.assert_array_equal(np.isnan(seen), np.isnan(scored))
    assert 0 < np.isnan(seen).sum() < 6


def test_metrics_of_other_sequences_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = tiny.tokenised(tiny.candidates(), tokenizer)
    curriculum = observing(metrics=[GlobalNaturalness(), LocalNaturalness(window=1)])
    curriculum.use_tokenizer(tokenizer)
    with pytest.raises(ValueError, match=r"observe=True: local_naturalness .*observe=False"):
        curriculum.bind(ScoredDataset(rows, end_token_ids=[257]))


def test_a_compiled_student_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of("Trainer", tmp_path, tokenizer)
    trainer.args.torch_compile = True
    with pytest.raises(ValueError, match=r"torch_compile=True.*observe=True"):
        attach(trainer, observing())
