"""A curriculum for a trainer that somebody else's code makes and trains, such as LLaMA-Factory's or ms-swift's.

with attached(curriculum, prompt_column="prompt_id"):
    run_exp(arguments)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

from distill_sampler.curriculum import Curriculum
from distill_sampler.integrations.transformers import attach


@contextmanager
def attached(curriculum: Curriculum, **options: Any) -> Iterator[None]:
    """Attach a curriculum to the trainer that is made in this block, when its training starts.

    At that point the trainer is complete, whatever its class does after the constructor of `Trainer`. Only one trainer
    can be trained in the block, because a curriculum holds the scores and plans of one run.

    Args:
        curriculum: what to score and how to plan.
        options: the options of `attach`. Hosts that drop the columns of the data need `prompt_column`, and some need
            `replace_sampler`.

    Raises:
        ValueError: no trainer was trained in the block, or, when training starts, what `attach` refuses.
        TypeError: `attach` has no such option.
    """
    inspect.signature(attach).bind(None, curriculum, **options)
    make: Any = Trainer.__init__
    trained = []

    @functools.wraps(make)
    def make_to_attach(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        make(trainer, *args, **kwargs)

        def attach_and_train(*args: Any, **kwargs: Any) -> Any:
            del vars(trainer)["train"]
            attach(trainer, curriculum, **options)
            trained.append(trainer)
            return trainer.train(*args, **kwargs)

        trainer.train = attach_and_train  # type: ignore[method-assign]

    Trainer.__init__ = make_to_attach  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Trainer.__init__ = make  # type: ignore[method-assign]
    if not trained:
        raise ValueError(
            "attached(curriculum): no trainer was made and trained in this block, so the curriculum did nothing. Make "
            "the trainer inside the block and call its train() there, in this process."
        )
