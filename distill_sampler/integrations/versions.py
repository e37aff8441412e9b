"""What older releases of transformers, TRL and accelerate lack, and what is done instead.

| release | what it brought |
|---|---|
| accelerate 1.12 | sequence parallelism (`sp_size`) |
| transformers 5.2 | `train_sampling_strategy`, which replaced `group_by_length`; `deactivate_neftune` as a function |
| transformers 5.3 | `Trainer._init_training_state`, which decides where training begins |
| TRL 1.0 | `truncation_mode` |
| TRL 1.4 | the trainer's own `chat_template` |
| TRL 1.7 | `labels` in the prepared data set; until then the collator made them from masks |
| TRL 1.15 | log-probabilities in place of `loss_type="chunked_nll"`, the default since 1.7, which hides the logits |

Everything that depends on a release is in this file, so that a new release concerns one file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import accelerate  # type: ignore[import-untyped]
import datasets
import numpy as np
import transformers
from packaging.version import Version
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

OLDEST_TRANSFORMERS = "4.57"
OLDEST_TRL = "0.24"


def _reaches(installed: str, release: str) -> bool:
    return Version(installed) >= Version(release)


def _trl_reaches(release: str) -> bool:
    import trl  # only here: an extra, which an SFTTrainer has imported already

    return _reaches(trl.__version__, release)


if not _reaches(transformers.__version__, OLDEST_TRANSFORMERS):
    raise ImportError(
        f"distill_sampler needs transformers {OLDEST_TRANSFORMERS} or later; {transformers.__version__} is installed."
    )

BEGINS_ANYWHERE = _reaches(transformers.__version__, "5.3")
"""Whether the place at which training begins can be set. If it cannot, the size of a step must not change."""


class Begins(Protocol):
    """What decides where a run begins: the callback of an attached curriculum."""

    def begin(
        self, state: TrainerState, checkpoint: Path | None, output: Path, *, max_steps: int, steps_per_epoch: int
    ) -> tuple[int, int]: ...


def sampling_of(args: TrainingArguments) -> tuple[str, str] | None:
    """The setting that makes the trainer order samples itself, and the value that leaves it to others; None if none."""
    if _reaches(transformers.__version__, "5.2"):
        strategy = args.train_sampling_strategy
        return None if strategy == "random" else (f"train_sampling_strategy='{strategy}'", "'random'")
    return ("group_by_length=True", "False") if args.group_by_length else None  # type: ignore[attr-defined]


def parallel_sizes(config: Any) -> list[tuple[str, str, int]]:
    """Kind, setting and size of each parallelism within a sequence in accelerate's `ParallelismConfig`."""
    sizes = [("tensor", "tp_size", config.tp_size), ("context", "cp_size", config.cp_size)]
    if _reaches(accelerate.__version__, "1.12"):
        sizes.append(("sequence", "sp_size", config.sp_size))
    return sizes


def deactivate_neftune(trainer: Trainer) -> None:
    """Remove the trainer's noise from the embeddings."""
    if _reaches(transformers.__version__, "5.2"):
        from transformers.integrations.neftune import deactivate_neftune as deactivate

        deactivate(trainer.model, trainer.neftune_hook_handle, trainer.accelerator)  # type: ignore[no-untyped-call]
    else:
        trainer._deactivate_neftune(trainer.model)  # type: ignore[attr-defined]


# ---- TRL ----


def refuse_old_trl() -> None:
    """Refuse a release of TRL that is too old.

    Raises:
        ImportError: it is.
    """
    import trl

    if not _trl_reaches(OLDEST_TRL):
        raise ImportError(f"distill_sampler needs trl {OLDEST_TRL} or later; {trl.__version__} is installed.")


def without_logits(args: TrainingArguments) -> tuple[str, str] | None:
    """The setting with which the trainer computes its loss where no gradient of a token can be reached, and what to set
    in its place; None: it can be reached."""
    if args.use_liger_kernel:
        return "use_liger_kernel=True", "Leave it off"
    if getattr(args, "loss_type", None) == "chunked_nll":
        return "loss_type='chunked_nll' (the default of this release of TRL)", "Set loss_type='nll', the same loss"
    return None


def truncation_mode(args: Any) -> Literal["keep_start", "keep_end"]:
    """Which end of a row that is too long `SFTTrainer` keeps."""
    mode: Literal["keep_start", "keep_end"] = args.truncation_mode if _trl_reaches("1.0") else "keep_start"
    return mode


def training_template(trainer: Any) -> str | None:
    """The chat template that `SFTTrainer` uses in place of the tokenizer's; None if it uses the tokenizer's."""
    template: str | None = trainer.chat_template if _trl_reaches("1.4") else None
    return template


def prepared_rows(trainer: Any) -> Any:
    """The rows that `SFTTrainer` has prepared, with the column `labels` that it trains on.

    Before 1.7, TRL's collator makes the labels of each batch from the masks that it finds in the rows. They are made
    here by the same rule. The collator then reads them.
    """
    rows = trainer.train_dataset
    if _trl_reaches("1.7") or not isinstance(rows, datasets.Dataset) or "labels" in rows.column_names:
        return rows
    masks = ["assistant_masks", *(["completion_mask"] if trainer.completion_only_loss else [])]
    with trainer.args.main_process_first(desc="making the labels"):
        return rows.with_format(None).map(
            _labels,
            batched=True,
            fn_kwargs={"masks": [name for name in masks if name in rows.column_names]},
            num_proc=trainer.args.dataset_num_proc,
            desc="Making the labels",
        )


def _labels(batch: Mapping[str, Sequence[Any]], *, masks: Sequence[str]) -> dict[str, list[list[int]]]:
    labels = []
    for row, input_ids in enumerate(batch["input_ids"]):
        trained = np.ones(len(input_ids), bool)
        for name in masks:
            trained &= np.asarray(batch[name][row], bool)
        labels.append(np.where(trained, input_ids, -100).tolist())
    return {"labels": labels}


# ---- Where training begins ----


class BeginsInLoop(TrainerCallback):
    """Begins a run in a trainer that computes by itself where training begins (transformers before 5.3).

    Such a trainer counts the steps of the checkpoint, and reads batches of the size that the checkpoint was written
    with. So a resume must have steps of that size.

    Args:
        trainer: whose loop it is.
        follower: begins the run.
    """

    def __init__(self, trainer: Trainer, follower: Begins) -> None:
        self._trainer = trainer
        self._follower = follower
        self._checkpoint: Path | None = None
        self._trial: Any = None
        loop: Any = trainer._inner_training_loop

        def noting_loop(*args: Any, resume_from_checkpoint: Any = None, trial: Any = None, **kwargs: Any) -> Any:
            self._checkpoint = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
            self._trial = trial
            return loop(*args, resume_from_checkpoint=resume_from_checkpoint, trial=trial, **kwargs)

        trainer._inner_training_loop = noting_loop  # type: ignore[method-assign]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the run.

        Raises:
            ValueError: training would not continue at the place in the plan that the checkpoint names.
        """
        self._refuse_another_size(
            self._trainer._train_batch_size == args.train_batch_size,  # the checkpoint's
            f"it was written with per_device_train_batch_size={self._trainer._train_batch_size}, and that is "
            f"{args.train_batch_size} now",
        )
        accumulation = args.gradient_accumulation_steps
        steps_per_epoch = max(-(-len(kwargs["train_dataloader"]) // accumulation), 1)
        epoch, into_epoch = divmod(state.global_step, steps_per_epoch)
        output = Path(self._trainer._get_output_dir(self._trial))
        place = self._follower.begin(
            state, self._checkpoint, output, max_steps=state.max_steps, steps_per_epoch=steps_per_epoch
        )
        self._refuse_another_size(
            place == (epoch, into_epoch * accumulation),
            f"its plan continues at batch {place[1]} of epoch {place[0]}, but the trainer counts {state.global_step} "
            f"steps of {steps_per_epoch} an epoch. A step has another size now, or a callback ended an epoch early",
        )

    def _refuse_another_size(self, same: bool, why: str) -> None:
        if not same:
            raise ValueError(
                f"{self._checkpoint} cannot be resumed from with transformers {transformers.__version__}: {why}. Give "
                "per_device_train_batch_size, gradient_accumulation_steps and processes the checkpoint's values again, "
                "or install transformers 5.3 or later, with which a step may change its size."
            )
