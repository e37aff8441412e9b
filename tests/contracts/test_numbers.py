"""Numbers of numpy, which come out of users' own computations, count as those of Python; other things are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_sampler import Anneal, Curriculum, KeepTop, RankSurprisalRatio, Rescore, ScoredDataset, Scorer, Shuffle
from distill_sampler.metrics import LocalNaturalness
from distill_sampler.planning.packs import Packing
from tests.test_attach import attach, curriculum, sft_trainer

RSR = "rank_surprisal_ratio"


def bound(number: Callable[[Any], Any], dataset: ScoredDataset, *, packed: bool) -> Curriculum:
    """A curriculum whose numbers were made by `number`."""
    made = Curriculum(
        metrics=[RankSurprisalRatio(rank_clip=number(50))],
        policies=[KeepTop(RSR, num=number(9)), Shuffle()],
        rescore=Rescore(every_epochs=number(2)),
        scorer=Scorer(progress=False, batch_tokens=number(300)),
        seed=number(3),
        **{"num_tokens" if packed else "num_samples": number(480)},
    )
    packing = Packing(capacity=number(240), window=number(8), balance=number(2)) if packed else None
    made.bind(dataset, packing=packing)
    return made


@pytest.mark.parametrize("packed", [False, True])
def test_a_checkpoint_does_not_depend_on_whose_numbers_it_was_given(
    packed: bool, dataset: ScoredDataset, model: PreTrainedModel
) -> None:
    ours, theirs = (bound(number, dataset, packed=packed) for number in (np.int64, int))
    plan = ours.start_epoch(0, model)
    theirs.load_state_dict(json.loads(json.dumps(ours.state_dict())))  # which other settings are refused by
    assert theirs.start_epoch(0, model) == plan


def test_a_window_and_an_annealed_number_may_be_of_numpy(
    dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    ours, theirs = (LocalNaturalness(window=window, tokenizer=tokenizer, max_tokens=4) for window in (2, np.int64(2)))
    sample = dataset.sample(0)
    assert [view.identity for view in ours.views(sample)] == [view.identity for view in theirs.views(sample)]
    assert len(ours.views(sample)) > 2
    annealed = Anneal(KeepTop(RSR, num=np.int64(2)), "num", to=9)
    assert annealed.at(0.5) == KeepTop(RSR, num=6)


def test_attach_takes_whole_numbers_of_numpy(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    attached = curriculum()
    trainer = sft_trainer(tmp_path, tokenizer)
    attach(trainer, attached, pack_to=np.int64(240), pack_window=np.int64(8), report_every=np.int64(1))
    assert attached.sampler.noun == "packs"


@pytest.mark.parametrize("value", [2.5, True, "9"])
@pytest.mark.parametrize("name", ["pack_to", "batch_tokens", "pack_window", "pack_balance", "report_every"])
def test_attach_refuses_what_is_no_whole_number(
    name: str, value: object, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    more = {"pack_to": 240} if name in ("pack_window", "pack_balance") else {}
    trainer = sft_trainer(tmp_path, tokenizer, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match=f"{name}={value!r}: give a"):
        attach(trainer, curriculum(), **{**more, name: value})


@pytest.mark.parametrize("value", [2.5, True, "9"])
@pytest.mark.parametrize(
    ("made", "name"), [(Rescore, "every_epochs"), (Rescore, "every_steps"), (Rescore, "lag"), (Scorer, "batch_tokens")]
)
def test_budgets_refuse_what_is_no_whole_number(made: Callable[..., Any], name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value!r}\): give a positive"):
        made(**{name: value})
