"""Trainers with a sampler or data loader of their own: which of them hand on those of transformers after all, and what
takes the place of the others.

Trainers of other projects often override `_get_train_sampler` or `get_train_dataloader` for a setting that is off: they
then return what transformers made. Whether one does is tried, not guessed from its class.
"""

from __future__ import annotations

import logging
from types import MethodType
from typing import Any

import torch.utils.data
from transformers import Trainer

logger = logging.getLogger(__name__)


def refuse_own_order(trainer: Trainer, *, replace: bool) -> None:
    """Refuse a trainer that draws its samples by itself, or say what the plan takes the place of.

    Args:
        trainer: has a data set with row numbers.
        replace: `attach(replace_sampler=)`.

    Raises:
        ValueError: the trainer packs batches in its sampler, or has an order of its own and `replace` is False.
    """
    name, data = type(trainer).__name__, trainer.train_dataset
    assert data is not None
    stand_in = torch.utils.data.SequentialSampler(data)  # type: ignore[arg-type]
    sampler = _made_by(trainer, "_get_train_sampler", stand_in, data)
    if isinstance(sampler, torch.utils.data.BatchSampler):
        raise ValueError(
            f"{name} draws whole batches ({type(sampler).__name__}), so samples cannot be chosen one by one. Turn that "
            "setting of the trainer off (sample packing, balanced batches). attach(pack_to=) packs each epoch's plan."
        )
    has_loader = has_own_loader(trainer)
    own = [] if sampler is stand_in else [f"its sampler ({type(sampler).__name__})"]
    if has_loader:
        own.append("its data loader (get_train_dataloader)")
    if own and not replace:
        raise ValueError(
            f"{name} would draw samples through {' and '.join(own)}, not in the order of a plan. Turn off the setting "
            f"that asks for it, or pass attach(replace_sampler=True): then the plan's sampler"
            f"{' and the data loader of transformers take' if has_loader else ' takes'} its place. (Not for trainers "
            "that generate, such as GRPO: their samplers repeat prompts.)"
        )
    if own:
        logger.warning("replace_sampler=True: the plan takes the place of %s of %s.", " and ".join(own), name)


def has_own_loader(trainer: Trainer) -> bool:
    """Whether the trainer makes another data loader for training than transformers does."""
    stand_in: Any = torch.utils.data.DataLoader(trainer.train_dataset)  # type: ignore[arg-type]
    return _made_by(trainer, "get_train_dataloader", stand_in) is not stand_in


def load_as_transformers(trainer: Trainer) -> None:
    """Make the trainer load its training batches as transformers does, from the sampler that it is given."""
    trainer.get_train_dataloader = MethodType(Trainer.get_train_dataloader, trainer)  # type: ignore[method-assign]


def _made_by(trainer: Trainer, method: str, stand_in: object, *arguments: object) -> object:
    """What a trainer's method returns while the same method of transformers returns the stand-in."""
    original = getattr(Trainer, method)
    if getattr(type(trainer), method) is original:
        return stand_in
    kept = dict(vars(trainer))
    setattr(Trainer, method, lambda self, *args, **kwargs: stand_in)
    try:
        return getattr(trainer, method)(*arguments)
    finally:
        setattr(Trainer, method, original)
        vars(trainer).clear()  # a trainer may remember what it has made
        vars(trainer).update(kept)
