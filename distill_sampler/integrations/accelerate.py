"""A loop of one's own with accelerate: everything that `attach` gives a trainer, in one generator of batches.

    loop = CurriculumLoop(curriculum, ScoredDataset(rows), accelerator, output_dir="student")
    loader = DataLoader(rows, batch_size=4, sampler=loop.sampler, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(loop)
    for epoch in loop.epochs(2):
        for batch in loop.batches(model, loader):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

Between two batches the loop knows that the one before was trained on: loss weights have been applied, scores observed,
and if it is time, the rest of the epoch is planned anew.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import nn

from distill_sampler.curriculum import Curriculum
from distill_sampler.dataset import ScoredDataset
from distill_sampler.distributed import Ranks
from distill_sampler.integrations.batches import batch_of
from distill_sampler.integrations.checkpoints import FOLDER, new_run
from distill_sampler.integrations.loss_weights import LossWeights
from distill_sampler.integrations.observed_scores import ObservedScores
from distill_sampler.integrations.refusals import refuse_parallelism, refuse_second_host
from distill_sampler.integrations.sample_log import SampleLog
from distill_sampler.planning.sampler import DistillSampler
from distill_sampler.protocols import Tap
from distill_sampler.types import Batch

logger = logging.getLogger(__name__)


def _without_randomness(loader: Any) -> Iterator[Any]:
    """The batches of a loader whose iteration draws nothing from the random state.

    A data loader draws the seed of its workers when it is first iterated over. After a resume that happens again, while
    the random state that came with the checkpoint is already that of the next training step.
    """
    iterator = iter(loader)
    with torch.random.fork_rng(devices=[]):
        first = list(itertools.islice(iterator, 1))
    yield from first
    yield from iterator


class CurriculumLoop:
    """Drives a curriculum in an accelerate loop. Its state goes into accelerate's checkpoints.

    Args:
        curriculum: what to score and how to plan. Give metrics that read text a tokenizer (`curriculum.use_tokenizer`).
        dataset: the prepared data.
        accelerator: the loop's own.
        output_dir: where scores and plans are kept as they happen, for `distill-sampler report` and for an interrupted
            scoring pass; None: in memory.
        sample_log: record which samples each batch held (needs `output_dir`).
        taps: anything else that rides on the batches.

    Raises:
        ValueError: the accelerator's settings rule out a curriculum, the data set lacks something, or the curriculum
            drives another trainer or loop.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        dataset: ScoredDataset,
        accelerator: Accelerator,
        *,
        output_dir: str | Path | None = None,
        sample_log: bool = False,
        taps: Sequence[Tap] = (),
    ) -> None:
        refuse_parallelism(accelerator)
        refuse_second_host(curriculum)
        for name in ("dispatch_batches", "split_batches"):
            if getattr(accelerator.dataloader_config, name):
                raise ValueError(
                    f"DataLoaderConfiguration({name}=True) deals out batches in another order than planned. Leave it "
                    "at False."
                )
        if sample_log and output_dir is None:
            raise ValueError("sample_log=True writes into the output folder; give output_dir= too.")
        self.curriculum = curriculum
        self.accelerator = accelerator
        self.sampler: DistillSampler = curriculum.bind(dataset, applies_weights=True, observes=True)
        """What the data loader draws from."""
        self.step = 0
        """Optimizer steps taken so far."""
        self._output = None if output_dir is None else Path(output_dir)
        self._taps = list(taps)
        if sample_log and self._output is not None:
            self._taps.append(SampleLog(self._output / FOLDER / f"samples-{accelerator.process_index}.jsonl"))
        if curriculum.planner.gives_weights:
            self._taps.append(LossWeights())
        if curriculum.observe:
            self._taps.append(ObservedScores(curriculum))
        curriculum.driven_by = type(self).__name__
        self._run = ""
        self._epoch: int | None = None
        self._num_epochs: int | None = None
        self._into_epoch = 0
        """Optimizer steps taken in this epoch."""
        self._position = 0
        """Samples of this epoch's plan that all processes together have trained on."""
        self._into_step = 0
        """Samples of them since the last optimizer step."""
        self._per_step = 0
        """Samples in an optimizer step; 0: nothing was trained yet."""
        self._handed_out: tuple[Batch | None, nn.Module, int] | None = None
        """The batch that the loop body has, the student, and the samples that all processes train on with it."""

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """The epochs to train, from 0, or from where a checkpoint left off.

        Args:
            num_epochs: of the whole run.
        """
        self._num_epochs = num_epochs
        first = 0 if self._epoch is None else self._epoch
        for epoch in range(first, num_epochs):
            if epoch != self._epoch:
                self._begin_epoch(epoch)
            yield epoch

    def batches(self, model: nn.Module, loader: Any) -> Iterator[Any]:
        """Score and plan the epoch, then give its batches: a whole number of optimizer steps.

        What the plan lacks for that is taken from its start, and with `drop_last=True` what is too much is left out, so
        that one process and several train on the same samples in each step.

        Train on each batch before you take the next one: a whole forward and backward pass, and the optimizer step if
        it is time for one.

        Args:
            model: the student, as `accelerator.prepare` returned it.
            loader: the data loader over `sampler`, as `accelerator.prepare` returned it.

        Raises:
            ValueError: the plan has another length than the epochs, or a batch holds other tokens than planned.
        """
        if self._epoch is None:
            raise ValueError("Take the batches inside `for epoch in loop.epochs(num_epochs)`.")
        if not self._run:
            self._begin(new_run())
        planned = len(self.curriculum.summaries)
        samples_per_batch = loader.total_batch_size
        per_step = samples_per_batch * self.accelerator.gradient_accumulation_steps
        self.sampler.in_whole_steps(per_step, cut=bool(getattr(loader.batch_sampler, "drop_last", False)))
        self.curriculum.start_epoch(self._epoch, model, step=self.step, num_epochs=self._num_epochs)
        self._report(planned)
        dataset = self.curriculum.dataset
        per_batch = samples_per_batch // self.accelerator.num_processes
        if self._position:
            loader = _without_randomness(self._continued(loader, per_step))
        self._per_step = per_step
        with ExitStack() as opened:
            for tap in self._taps:
                opened.enter_context(tap.open(model, step=self.step))
            for inputs in loader:
                plan = self.curriculum.sampler.plan
                assert plan is not None
                batch: Batch | None = None
                if self._taps:
                    place = self._position + self.accelerator.process_index * per_batch
                    batch = batch_of(inputs, plan, dataset, place=place, epoch=self._epoch, step=self.step)
                    for tap in self._taps:
                        tap.before(batch)
                self._handed_out = batch, model, samples_per_batch
                yield inputs
                self._trained()
        self._begin_epoch(self._epoch + 1)

    def finish(self) -> None:
        """Training is over: write `scores.parquet` and `plans.parquet` into the output folder."""
        if self._output is not None and self.accelerator.is_main_process:
            self.curriculum.cycle.done()
            self.curriculum.save_run(self._output)

    def state_dict(self) -> dict[str, Any]:
        """The curriculum's state, and where the loop stands. `accelerator.register_for_checkpointing(loop)` takes it.

        All processes call it. A batch that was handed out counts as trained, so inside the loop save after the step.
        """
        self._trained()
        if self._into_step:
            logger.warning(
                "This checkpoint is written between two batches of one optimizer step. accelerate does not save the "
                "accumulated gradients, so a resume from it differs. Save when accelerator.sync_gradients is True."
            )
        self.curriculum.store.observed.merge(Ranks.current(self.accelerator.device))
        return {
            "curriculum": self.curriculum.state_dict(),
            "run": self._run,
            "step": self.step,
            "epoch": self._epoch,
            "into_epoch": self._into_epoch,
            "position": self._position,
            "into_step": self._into_step,
            "per_step": self._per_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave: the loop continues the plan behind the last sample that was trained on.

        Batches may have another size now, and processes another number: the rest of the plan is trained in steps as
        long as they are now. A schedule of the learning rate is the loop's own, and counts the steps that it counts.

        Raises:
            ValueError: the state belongs to another data set or configuration.
        """
        self._begin(str(state["run"]))
        self.curriculum.load_state_dict(state["curriculum"], epoch_over=state["position"] == 0)
        self.step, self._epoch = state["step"], state["epoch"]
        self._into_epoch, self._position = state["into_epoch"], state["position"]
        self._into_step, self._per_step = state["into_step"], state["per_step"]

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch, self._into_epoch, self._position, self._into_step = epoch, 0, 0, 0

    def _continued(self, loader: Any, per_step: int) -> Any:
        """The loader's batches from the position on that the epoch has come to."""
        into_step = self._into_step // loader.total_batch_size  # batches, whose gradients are lost
        skip = self.sampler.resume_at(self._position - self._into_step) // loader.total_batch_size + into_step
        self._position = self.sampler.shift + skip * loader.total_batch_size
        self._into_step = into_step * loader.total_batch_size
        self.accelerator.step = into_step  # accelerate counts batches, and has counted others
        if self._per_step != per_step:
            logger.warning(
                "Until this checkpoint, optimizer steps had %d samples, now they have %d. Training continues at sample "
                "%d of %d of the plan of epoch %d.",
                self._per_step,
                per_step,
                self._position,
                self.sampler.num_samples,
                self._epoch,
            )
        return self.accelerator.skip_first_batches(loader, skip)

    def _begin(self, run: str) -> None:
        self._run = run
        self.curriculum.keep(self._output, run=run, write=self.accelerator.is_main_process)

    def _trained(self) -> None:
        """The batch that was handed out has been trained on."""
        if self._handed_out is None:
            return
        (batch, model, samples_per_batch), self._handed_out = self._handed_out, None
        if batch is not None:
            for tap in self._taps:
                tap.after(batch)
        self._position += samples_per_batch
        self._into_step += samples_per_batch
        if not self.accelerator.sync_gradients:
            return
        self.step += 1
        self._into_epoch += 1
        self._into_step = 0
        self.curriculum.progress(self._position)
        planned = len(self.curriculum.summaries)
        start = self._position + self.curriculum.rescore.lag * self._per_step
        self.curriculum.replan(model, step=self.step, into_epoch=self._into_epoch, start=start)
        self._report(planned)

    def _report(self, planned: int) -> None:
        """Print the table of a plan that was just made."""
        summaries = self.curriculum.summaries
        if len(summaries) > planned and self.accelerator.is_main_process and self.curriculum.scorer.progress:
            summaries[-1].print()
