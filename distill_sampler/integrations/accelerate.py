"""Training loops written with accelerate: everything that `attach` gives a trainer, in one generator of batches.

    loop = CurriculumLoop(curriculum, ScoredDataset(rows), accelerator, output_dir="student")
    loader = DataLoader(rows, batch_size=4, sampler=loop.sampler, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(loop)
    for epoch in loop.epochs(2):
        for batch in loop.batches(model, loader):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

When a batch is requested, the batch before it has been trained on. At that moment the scores it showed are stored, and
if it is time, the rest of the epoch is planned anew.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import nn

from distill_sampler.artifacts.manifest import Manifests
from distill_sampler.curriculum import Curriculum
from distill_sampler.dataset import ScoredDataset
from distill_sampler.distributed import Ranks
from distill_sampler.integrations.batches import batch_of
from distill_sampler.integrations.checkpoints import FOLDER, Readers, new_run, why_damaged
from distill_sampler.integrations.live_report import LiveReport
from distill_sampler.integrations.loss_weights import LossWeights
from distill_sampler.integrations.objectives import refuse_shared_weights, set_up
from distill_sampler.integrations.observed_scores import ObservedScores
from distill_sampler.integrations.packs import PACK_WINDOW, PackedRows, RowsOfLoop
from distill_sampler.integrations.refusals import refuse_dispatching, refuse_parallelism, refuse_second_host
from distill_sampler.integrations.resuming import without_randomness
from distill_sampler.integrations.sample_log import SampleLog
from distill_sampler.integrations.trackers import numbers_of, show_plan
from distill_sampler.objectives.places import predicting
from distill_sampler.planning.packs import Packing
from distill_sampler.planning.sampler import DistillSampler
from distill_sampler.planning.summary import PREFIX, Logs
from distill_sampler.protocols import Objective, Tap
from distill_sampler.types import Batch
from distill_sampler.watch import set_timeout

logger = logging.getLogger(__name__)


class CurriculumLoop:
    """Drives a curriculum in an accelerate loop. Its state goes into accelerate's checkpoints.

    Args:
        curriculum: what to score and how to plan. If a metric reads text, call `curriculum.use_tokenizer` first.
        dataset: the prepared data.
        accelerator: the one that the loop trains with.
        output_dir: folder in which scores and plans are kept as they are made, so that `distill-sampler report` can
            show them and an interrupted scoring pass can continue; None: they stay in memory.
        sample_log: record which samples each batch held (needs `output_dir`).
        taps: further taps on the batches.
        objective: what training minimises beside the loop's own loss, such as `SoftTargets(teacher)`; one or several.
            Call `prepare(model)` before you make the optimizer, and train on `loss(loss)`.
        tokenizer: the student's, for objectives that find a response by its text.
        manifests: write the hashes of its files into each checkpoint of `accelerator.save_state`, in a thread beside
            training, and compare a checkpoint with them in `accelerator.load_state`. False: do neither.
        logs: which numbers of each plan `numbers` gives, as for `attach`.
        report_every: write the report (`report.html` in the output folder) after the plan of every so many epochs, and
            in `finish`. None: write none.
        pack_to: lay the samples of each epoch's plan end to end in packs of at most so many tokens. Give the data
            loader `loop.packed(rows)` and `collate_fn=DataCollatorWithFlattening()`. The batch size counts packs. The
            loop sets `model.config.use_cache` to False.
        pack_window: from how many samples of the plan a pack is filled, as for `attach`.
        pack_balance: how many packs in a row are sorted by the cost of their attention, as for `attach`.

    Raises:
        ValueError: the accelerator's settings rule out a curriculum, the data set lacks a column, or the curriculum
            already drives another trainer or loop.
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
        objective: Objective | Sequence[Objective] = (),
        tokenizer: Any = None,
        manifests: bool = True,
        logs: Logs = "few",
        report_every: int | None = None,
        pack_to: int | None = None,
        pack_window: int = PACK_WINDOW,
        pack_balance: int = 1,
    ) -> None:
        refuse_parallelism(accelerator)
        refuse_second_host(curriculum)
        refuse_dispatching(accelerator)
        for name, given in {"sample_log=True": sample_log, f"report_every={report_every}": report_every}.items():
            if given and output_dir is None:
                raise ValueError(f"{name} writes into the output folder, so it needs output_dir= too.")
        self.curriculum = curriculum
        self.accelerator = accelerator
        packing = None if pack_to is None else Packing(capacity=pack_to, window=pack_window, balance=pack_balance)
        self._objectives, self._objective_taps, self._teachers = set_up(objective, dataset, tokenizer)
        self.sampler: DistillSampler = curriculum.bind(
            dataset, applies_weights=True, observes=True, packing=packing, teachers=self._teachers
        )
        """The sampler to give to the data loader."""
        self.step = 0
        """Optimizer steps taken so far."""
        self._output = None if output_dir is None else Path(output_dir)
        self._live_report = LiveReport(curriculum, report_every)
        self._taps = list(taps)
        if sample_log:
            self._taps.append(SampleLog(rank=accelerator.process_index, world_size=accelerator.num_processes))
        if curriculum.planner.gives_weights:
            self._taps.append(LossWeights())
        if curriculum.observe:
            self._taps.append(ObservedScores(curriculum, self._objective_taps))
        self._rows = RowsOfLoop(self._teachers, packed=packing is not None)
        self._taps += self._objective_taps
        self._prepared: nn.Module | None = None
        self._scale: torch.Tensor | None = None
        """1 / (number of counted tokens in the batch that the loop body is training on); None: its loss is complete."""
        self._readers = Readers(ranks=Ranks.current(accelerator.device), compare=manifests)
        self._manifests = Manifests(write=accelerator.is_main_process, beside=False)
        accelerator.register_save_state_pre_hook(self._saving)
        accelerator.register_load_state_pre_hook(self._loading)
        handler = accelerator.init_handler  # InitProcessGroupKwargs
        set_timeout(math.inf if handler is None else handler.timeout.total_seconds())
        curriculum.driven_by = type(self).__name__
        self._logs: Logs = logs
        self._pending: dict[str, float] = {}
        """Numbers for the next log entry."""
        self._run = ""
        self._epoch: int | None = None
        self._num_epochs: int | None = None
        self._into_epoch = 0
        """Optimizer steps taken in this epoch."""
        self._position = 0
        """Samples (or packs) of this epoch's plan that all processes together have trained on."""
        self._into_step = 0
        """How many of these were trained on since the last optimizer step."""
        self._per_step = 0
        """Samples (or packs) in an optimizer step; 0: nothing was trained yet."""
        self._in_training: tuple[Batch | None, nn.Module, int] | None = None
        """The batch that the loop body is training on, the student, and how many samples (or packs) all processes train
        on in the same step of the loop."""

    def packed(self, rows: Any) -> PackedRows:
        """What the data loader reads if plans are packed: the rows of the loop's data set, whose indices are packs."""
        return PackedRows(rows)

    def prepare(self, model: nn.Module) -> None:
        """Let objectives add their own modules to the student. Call it before you create the optimizer.

        Raises:
            ValueError: an objective does not fit the student.
        """
        refuse_shared_weights(model, self._teachers)
        for objective in self._objectives:
            objective.prepare(model)
        self._prepared = model

    def loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of this batch with the objectives: `accelerator.backward(loop.loss(model(**batch).loss))`.

        Args:
            loss: the mean over the batch's tokens that are trained on, as models of transformers return it.

        Raises:
            ValueError: it was called twice for a batch, or the student's decoder did not run.
        """
        if not self._objectives:
            return loss
        if self._scale is None:
            raise ValueError("Call loop.loss once for each batch, inside the loop over loop.batches.")
        for tap in self._objective_taps:
            loss = tap.added_to(loss, scale=self._scale)
        self._scale = None
        return loss

    def numbers(self) -> dict[str, float]:
        """The curriculum's numbers since the last call, for your log: `accelerator.log(loop.numbers(), loop.step)`.

        They are those of a trainer's log: the newest plan's, the losses by teacher and domain with `observe=True`, and
        those of objectives. All processes must call it.
        """
        numbers, self._pending = self._pending, {}
        return numbers | numbers_of(self._taps, Ranks.current(self.accelerator.device))

    def _expect(self, inputs: Any) -> None:
        """Announce a batch to the objectives."""
        assert self._epoch is not None
        self._scale = 1 / predicting(inputs).sum().clamp(min=1)
        done = self._epoch + min(1.0, self._position / len(self.sampler))
        for tap in self._objective_taps:
            tap.expect(inputs, progress=done / (self._num_epochs or self._epoch + 1))

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """The numbers of the epochs to train, from 0, or from the checkpoint's epoch.

        Args:
            num_epochs: how many the whole run has.
        """
        self._num_epochs = num_epochs
        first = 0 if self._epoch is None else self._epoch
        for epoch in range(first, num_epochs):
            if epoch != self._epoch:
                self._begin_epoch(epoch)
            yield epoch

    def batches(self, model: nn.Module, loader: Any) -> Iterator[Any]:
        """Score the samples and plan the epoch, then yield its batches: a whole number of optimizer steps.

        If the plan is not a whole number of steps long, its first samples complete the last step; with `drop_last=True`
        the incomplete step is left out instead. So one process and several train on the same samples in each step.

        Train on each batch before you take the next one: run the forward and the backward pass, and the optimizer step
        where accumulation ends.

        Args:
            model: the student, as `accelerator.prepare` returned it.
            loader: the data loader over `sampler`, as `accelerator.prepare` returned it.

        Raises:
            ValueError: the plan does not have the length of an epoch, or a batch holds other tokens than planned.
        """
        if self._epoch is None:
            raise ValueError("loop.batches was called outside of an epoch. Use it in `for epoch in loop.epochs(n)`.")
        if not self._run:
            self._begin(self._readers.ranks.gather(new_run())[0])
        if self._objectives and self._prepared is None:
            raise ValueError("objective=: call loop.prepare(model) before you make the optimizer.")
        self._manifests.begin(self._readers.ranks)
        self._rows.check(model, loader)
        started, planned = time.perf_counter(), len(self.curriculum.summaries)
        samples_per_batch = loader.total_batch_size
        per_step = samples_per_batch * self.accelerator.gradient_accumulation_steps
        self.sampler.in_whole_steps(per_step, cut=bool(getattr(loader.batch_sampler, "drop_last", False)))
        self.curriculum.start_epoch(self._epoch, model, step=self.step, num_epochs=self._num_epochs)
        self._report(planned)
        if self._output is not None and self.accelerator.is_main_process:
            self._live_report.epoch_begins(self._output, self._epoch, self._num_epochs, step=self.step)
        dataset = self.curriculum.dataset
        per_batch = samples_per_batch // self.accelerator.num_processes
        if self._position:
            loader = without_randomness(self._continued(loader, per_step))
        self._per_step = per_step
        with ExitStack() as opened:
            for tap in self._taps:
                opened.enter_context(tap.open(model, step=self.step))
            for inputs in loader:
                plan = self.curriculum.sampler.plan
                assert plan is not None
                batch: Batch | None = None
                if self._taps or self._rows.packed:
                    row = self._position + self.accelerator.process_index * per_batch
                    first, stop = self.sampler.places(row), self.sampler.places(row + per_batch)
                    batch = batch_of(inputs, plan, dataset, place=first, stop=stop, epoch=self._epoch, step=self.step)
                    for tap in self._taps:
                        tap.before(batch)
                if self._objectives:
                    self._expect(inputs)
                self._in_training = batch, model, samples_per_batch
                yield inputs
                self._manifests.begin(self._readers.ranks)
                self._finish_batch()
        seconds = sum(summary.scoring.seconds for summary in self.curriculum.summaries[planned:])
        self._pending[f"{PREFIX}scoring_share"] = round(seconds / (time.perf_counter() - started), 4)
        self._begin_epoch(self._epoch + 1)

    def finish(self) -> None:
        """Write `scores.parquet` and `plans.parquet` into the output folder, and wait for the last manifest.

        All processes call it after training.
        """
        self._manifests.begin(self._readers.ranks)
        self._manifests.wait()
        if self._prepared is not None:
            for objective in self._objectives:
                objective.withdraw(self._prepared)
        if self._output is not None and self.accelerator.is_main_process:
            self.curriculum.cycle.done(self._output)
            self._live_report.training_ends(self._output)

    def state_dict(self) -> dict[str, Any]:
        """The curriculum's state and the loop's place in the plan, for `accelerator.register_for_checkpointing(loop)`.

        All processes must call it. The batch that the loop body holds counts as trained, so inside the loop save after
        the optimizer step.
        """
        self._finish_batch()
        if self._into_step:
            logger.warning(
                "This checkpoint is written between two batches of one optimizer step. accelerate does not save the "
                "accumulated gradients, so a run resumed from it trains this step again from its first batch, and "
                "dropout differs. Save where accelerator.sync_gradients is True."
            )
        self.curriculum.store.observed.merge(Ranks.current(self.accelerator.device))
        arrays: dict[str, npt.NDArray[Any]] = {}
        return {
            "curriculum": self.curriculum.state_dict(arrays),
            "arrays": {name: torch.from_numpy(array) for name, array in arrays.items()},
            "run": self._run,
            "step": self.step,
            "epoch": self._epoch,
            "into_epoch": self._into_epoch,
            "position": self._position,
            "into_step": self._into_step,
            "per_step": self._per_step,
            "places_per_epoch": self.sampler.places(self.sampler.shift + len(self.sampler)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. The loop continues the plan after the last sample that was trained on.

        The batch size and the number of processes may have changed: the rest of the plan is trained in steps of today's
        length. The learning-rate schedule belongs to the loop and is not changed.

        Raises:
            ValueError: the state belongs to another data set or configuration, or lacks something.
        """
        needed = {"run", "arrays", "curriculum", "position", "step", "epoch", "into_epoch", "into_step", "per_step"}
        if lacking := sorted(needed - state.keys()):
            raise ValueError(f"The loop's state lacks {', '.join(lacking)}. Load another checkpoint.")
        self._begin(str(state["run"]))
        arrays = {name: tensor.numpy() for name, tensor in state["arrays"].items()}
        self.curriculum.load_state_dict(state["curriculum"], arrays, epoch_over=state["position"] == 0)
        self.step, self._epoch = state["step"], state["epoch"]
        self._into_epoch, self._per_step = state["into_epoch"], state["per_step"]
        # The gradients of a begun step are lost, so it is trained again, from its first batch.
        self._position, self._into_step = state["position"] - state["into_step"], 0
        self.accelerator.step = 0  # accelerate's count of batches for accumulation

    def _saving(self, models: list[nn.Module], weights: list[Any], checkpoint: str) -> None:
        """accelerate is about to write a checkpoint. Its manifest follows when the loop goes on."""
        self._manifests.saving(Path(checkpoint), self._readers.ranks)
        if self._readers.compare:
            self._manifests.saved(Path(checkpoint))

    def _loading(self, models: list[nn.Module], checkpoint: str) -> None:
        """accelerate is about to load a checkpoint.

        Raises:
            ValueError: it is not what was saved.
        """
        self._manifests.begin(self._readers.ranks)
        self._manifests.wait()
        if reason := why_damaged(Path(checkpoint), self._readers):
            raise ValueError(f"{checkpoint} cannot be loaded: {reason}. Load another checkpoint.")

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch, self._into_epoch, self._position, self._into_step = epoch, 0, 0, 0

    def _continued(self, loader: Any, per_step: int) -> Any:
        """The loader without the batches that were trained on before the checkpoint."""
        skip = self.sampler.resume_at(self._position) // loader.total_batch_size
        self._position = self.sampler.shift + skip * loader.total_batch_size
        if self._per_step != per_step:
            logger.warning(
                "An optimizer step had %d %s until this checkpoint and has %d now. Training continues after %d of %d "
                "of the plan of epoch %d.",
                self._per_step,
                self.sampler.noun,
                per_step,
                self._position,
                self.sampler.num_rows,
                self._epoch,
            )
        return self.accelerator.skip_first_batches(loader, skip)

    def _begin(self, run: str) -> None:
        self._run = run
        self.curriculum.keep(self._output, run=run, write=self.accelerator.is_main_process)
        for tap in self._taps:
            if isinstance(tap, SampleLog):
                assert self._output is not None
                tap.begin(self._output / FOLDER, run)

    def _finish_batch(self) -> None:
        """Account for the batch that the loop body has trained on: call the taps, count the step, plan anew if due."""
        if self._in_training is None:
            return
        (batch, model, samples_per_batch), self._in_training = self._in_training, None
        if self._scale is not None:
            raise ValueError(
                "objective=: this batch was trained on without its objectives. Train on what loop.loss returns: "
                "accelerator.backward(loop.loss(model(**batch).loss))."
            )
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
        self.curriculum.progress(self.sampler.places(self._position))
        planned = len(self.curriculum.summaries)
        start = self.sampler.places(self._position + self.curriculum.rescore.lag * self._per_step)
        self.curriculum.replan(model, step=self.step, into_epoch=self._into_epoch, start=start)
        self._report(planned)

    def _report(self, planned: int) -> None:
        """Tell of the newest plan, if more than `planned` plans have been made: in the log, trackers and terminal."""
        summaries = self.curriculum.summaries
        if len(summaries) == planned:
            return
        self._pending.update(summaries[-1].logs(self._logs))
        if self.accelerator.is_main_process:
            show_plan(summaries[-1], ((each.name, each.tracker) for each in self.accelerator.trackers))
            if self.curriculum.scorer.progress:
                summaries[-1].print()
