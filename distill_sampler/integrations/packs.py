"""Packs in a trainer: its data loader reads tuples of samples, and its collator lays their rows end to end.

Data loader workers copy the data set when they start, so it does not contain packs: a pack *is* the index that the
sampler yields. Position ids restart with each sample, and attention must not cross from one sample to the next. Whether
it does depends on the model, so a trial checks it before training begins.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import datasets
import numpy as np
import torch
import torch.utils.data
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, Trainer

from distill_sampler.integrations.trl import is_sft_trainer, source_rows
from distill_sampler.planning.packs import Packing
from distill_sampler.protocols import Tap
from distill_sampler.reading.forward import reading
from distill_sampler.reading.structure import unwrap
from distill_sampler.types import Batch, IntArray, is_whole

Overlong = Literal["refuse", "truncate", "split"]

PACK_WINDOW = 64
PADDED_WINDOW = 1024
"""The default windows of packs and of padded batches."""

_SAME = 1e-3
"""Largest difference between logits that count as equal, relative to the largest logit, in float32."""
_SAME_LOW_PRECISION = 0.05
"""The same limit in bfloat16, float16 and TF32."""


class PackedRows(torch.utils.data.Dataset[Any]):
    """A data set whose indices are packs: `[(3, 1), (2,)] -> rows 3, 1 and 2`."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, pack: tuple[int, ...]) -> list[Any]:
        return self.__getitems__([pack])

    def __getitems__(self, packs: Sequence[tuple[int, ...]]) -> list[Any]:
        samples = [sample for pack in packs for sample in pack]
        if isinstance(self._rows, datasets.Dataset):
            return list(self._rows.__getitems__(samples))
        return [self._rows[sample] for sample in samples]


def pack_through(trainer: Trainer, packing: Packing) -> None:
    """Make the trainer's training data loader read packs. Evaluation does not change.

    Raises:
        ValueError: the trainer's collator does not lay samples end to end.
    """
    collator = trainer.data_collator if packing.padded else _laid_end_to_end(trainer.data_collator)
    get_dataloader: Any = trainer._get_dataloader

    def get_dataloader_of_packs(dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        if not is_training:
            return get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        if isinstance(dataset, datasets.Dataset):  # the trainer cannot see the columns through the wrapper
            dataset = trainer._remove_unused_columns(dataset, description="training")
        own, trainer.data_collator = trainer.data_collator, collator
        try:
            return get_dataloader(PackedRows(dataset), *args, is_training=is_training, **kwargs)
        finally:
            trainer.data_collator = own

    trainer._get_dataloader = get_dataloader_of_packs  # type: ignore[method-assign]


def packing_of(
    trainer: Trainer, pack_to: int | str | None, batch_tokens: int | None, window: int | None, balance: int
) -> Packing | None:
    """The packing of `attach(pack_to=, batch_tokens=, pack_window=, pack_balance=)`; None if nothing is packed.

    Raises:
        ValueError: an argument is not a number of tokens, or the trainer's settings contradict it.
    """
    if type(trainer)._get_dataloader is not Trainer._get_dataloader and (
        pack_to is not None or batch_tokens is not None
    ):
        raise ValueError(
            f"pack_to= and batch_tokens= need the data loaders of transformers, but {type(trainer).__name__} overrides "
            "_get_dataloader. Leave both out."
        )
    if batch_tokens is not None:
        if pack_to is not None:
            raise ValueError("pack_to= lays samples end to end, and batch_tokens= pads them. Give one of the two.")
        size = trainer.args.per_device_train_batch_size
        if size != 1:
            raise ValueError(
                f"batch_tokens={batch_tokens} puts as many samples as fit into a batch, but "
                f"per_device_train_batch_size={size}. Set it to 1: it counts these batches."
            )
        if lays_end_to_end(trainer.data_collator):
            raise ValueError(
                "batch_tokens= is for collators that pad, but this one lays samples end to end (padding_free=True?). "
                "Use pack_to= instead."
            )
        window = PADDED_WINDOW if window is None else window
        return Packing(capacity=batch_tokens, window=window, balance=balance, padded=True)
    if pack_to is None:
        return None
    capacity: Any = pack_to
    if pack_to == "max_length":
        capacity = trainer.args.max_length if is_sft_trainer(trainer) else None  # type: ignore[attr-defined]
        if capacity is None:
            raise ValueError(
                'pack_to="max_length": this trainer has no max_length. Give a number of tokens, such as pack_to=8192.'
            )
    if not is_whole(capacity):
        raise ValueError(f'pack_to={pack_to!r}: give a number of tokens, or "max_length".')
    return Packing(capacity=capacity, window=PACK_WINDOW if window is None else window, balance=balance)


def refuse_packed(rows: Any) -> None:
    """Refuse rows that already contain several samples.

    Raises:
        ValueError: the `seq_lengths` or `position_ids` of a row show several samples.
    """
    if not isinstance(rows, datasets.Dataset):
        return
    names = {"seq_lengths", "position_ids"} & set(rows.column_names)
    for start in range(0, len(rows) if names else 0, 1000):
        for name, values in rows.select_columns(sorted(names))[start : start + 1000].items():
            for row, value in enumerate(values, start):
                samples = len(value) if name == "seq_lengths" else sum(position == 0 for position in value)
                if samples > 1:
                    raise ValueError(
                        f"Row {row} of the data set is already packed: its {name} show {samples} samples, which can no "
                        "longer be chosen one by one. Give attach rows with one sample each, and use pack_to=, which "
                        "packs each epoch's plan. If a column has the sample id of each token, "
                        "distill_sampler.unpack(dataset, by=column) makes such rows."
                    )


def fitted(rows: Any, capacity: int, overlong: Overlong) -> tuple[Any, IntArray]:
    """The data set with rows of at most `capacity` tokens, and the number of the source row of each of its rows.

    Args:
        rows: the trainer's prepared data set.
        capacity: the largest number of tokens in a pack.
        overlong: what to do with longer rows. `"refuse"` leaves them for `Planner` to refuse; `"truncate"` keeps their
            first tokens; `"split"` cuts them into several rows, each of which is then a sample.

    Raises:
        ValueError: `overlong` has another value, or the data set is not a `datasets.Dataset` and must be cut.
    """
    if overlong not in ("refuse", "truncate", "split"):
        raise ValueError(f"pack_overlong={overlong!r}: choose one of 'refuse', 'truncate', 'split'.")
    source = source_rows(rows)
    if overlong == "refuse":
        return rows, source
    if not isinstance(rows, datasets.Dataset):
        raise ValueError(
            f'pack_overlong="{overlong}" works on a datasets.Dataset, but train_dataset is a {type(rows).__name__}. '
            "Truncate or split its rows before attach."
        )
    if overlong == "split":
        lengths = np.array([len(tokens) for tokens in rows.with_format(None)["input_ids"]], np.int64)
        source = np.repeat(source, -(-lengths // capacity))
    cut = rows.with_format(None).map(
        _cut,
        batched=True,
        fn_kwargs={"capacity": capacity, "split": overlong == "split"},
        desc=f"Cutting rows to {capacity} tokens",
    )
    return cut, source


def _cut(batch: Mapping[str, Sequence[Any]], *, capacity: int, split: bool) -> dict[str, list[Any]]:
    """Rows of at most `capacity` tokens. Columns with a value for each token are cut with the tokens."""
    result: dict[str, list[Any]] = {name: [] for name in batch}
    for row, tokens in enumerate(batch["input_ids"]):
        for start in range(0, len(tokens) if split else min(1, len(tokens)), capacity):
            for name, values in batch.items():
                value = values[row]
                by_token = isinstance(value, list) and len(value) == len(tokens) > capacity
                result[name].append(value[start : start + capacity] if by_token else value)
    return result


class SeparateSamples(Tap):
    """Checks that the samples of a pack do not see each other. (With a tap, every batch is compared with the plan.)

    Args:
        trainer: a trainer whose collator lays samples end to end.
        teachers: the models that also read the packs.
    """

    def __init__(self, trainer: Trainer, teachers: Sequence[nn.Module] = ()) -> None:
        self._collator = _laid_end_to_end(trainer.data_collator)
        self._teachers = teachers

    @contextmanager
    def open(self, model: nn.Module, *, step: int) -> Iterator[None]:
        for reads in (model, *self._teachers):
            refuse_crossing(reads, self._collator)
        config = unwrap(model).config.get_text_config()
        before = getattr(config, "use_cache", None)
        make_no_cache(model)
        try:
            yield
        finally:
            config.use_cache = before

    def before(self, batch: Batch) -> None:
        pass

    def after(self, batch: Batch) -> None:
        pass


def make_no_cache(model: nn.Module) -> None:
    """Let a model that lays samples end to end train without a cache of keys and values.

    Transformers looks at where the samples of a row begin (position ids that restart) only where there is no cache, and
    a forward pass makes one unless the configuration or the call says otherwise. Before transformers 5, `Trainer` does
    not switch it off.
    """
    unwrap(model).config.get_text_config().use_cache = False


def refuse_crossing(model: nn.Module, collator: Any) -> None:
    """Check that a sample's logits do not depend on the other sample in its row, by reading two samples in both orders.

    Args:
        model: the student, wrapped as in the trainer. All processes must take part.
        collator: a collator that lays samples end to end.

    Raises:
        ValueError: a sample's logits depend on what precedes it in the row.
    """
    texts = [torch.arange(2, 11).tolist(), torch.arange(3, 19).flip(0).tolist()]
    cure = (
        "Train this model without pack_to=. For linear attention and convolutions, install the kernels that take the "
        "boundaries of samples (seq_idx, cu_seq_lens), and use a collator that returns these: SFTTrainer's own, or "
        "DataCollatorWithFlattening with return_seq_idx=True and return_flash_attn_kwargs=True."
    )
    with reading(model) as forward:
        seen = []
        for order in (texts, texts[::-1]):
            inputs = collator([{"input_ids": text, "labels": text} for text in order])
            del inputs["labels"]
            on_device = {
                name: value.to(forward.device) if isinstance(value, Tensor) else value for name, value in inputs.items()
            }
            try:
                logits: Tensor = model(**on_device, use_cache=False).logits[0].float()
            except (TypeError, ValueError, NotImplementedError) as error:
                raise ValueError(
                    f"pack_to=: {type(model).__name__} cannot read samples that lie end to end in one row ({error}). "
                    + cure
                ) from error
            total = sum(map(len, texts))
            seen.append(torch.split(logits[:total], [len(text) for text in order]))
        low_precision = not forward.exact
    (first, second), (second_in_front, first_behind) = seen
    largest = first.abs().max()
    difference = torch.cat([first - first_behind, second - second_in_front]).abs().max() / largest
    if not difference <= (_SAME_LOW_PRECISION if low_precision else _SAME):
        raise ValueError(
            "pack_to=: with this model, a sample's logits depend on the sample before it in the row (they differ by "
            f"{difference:.2g} of the largest logit), so samples of a pack would be trained in each other's context. "
            f"{cure}"
        )


class RowsOfLoop:
    """Checks in a loop of one's own that the samples of a row do not see each other.

    Args:
        packed: whether plans are packed.
        teachers: the models that read the batches beside the student.
    """

    def __init__(self, teachers: Sequence[nn.Module], *, packed: bool) -> None:
        self.packed = packed
        self._not_tried: list[nn.Module | None] = [None, *teachers] if packed else []
        """None: the student."""

    def check(self, model: nn.Module, loader: Any) -> None:
        """Check the loop's settings before each epoch, and the models before the first.

        Args:
            model: the student, as the loop calls it.
            loader: the loop's data loader.

        Raises:
            ValueError: plans are packed and the loader has another data set or another collator, or samples in a row
                see each other.
        """
        if self.packed:
            _require_packed_loader(loader)
        if lays_end_to_end(loader.collate_fn):
            make_no_cache(model)
        while self._not_tried:
            refuse_crossing(self._not_tried[0] or model, loader.collate_fn)
            self._not_tried.pop(0)


def _require_packed_loader(loader: Any) -> None:
    if not isinstance(loader.dataset, PackedRows):
        raise ValueError(
            f"pack_to=: the data loader reads a {type(loader.dataset).__name__}, whose indices are single samples. "
            "Give it loop.packed(rows)."
        )
    if not lays_end_to_end(loader.collate_fn):
        raise ValueError(
            "pack_to= needs a collator that lays samples end to end, with position ids that restart, but the data "
            f"loader has {getattr(loader.collate_fn, '__name__', type(loader.collate_fn).__name__)}. Give it "
            "collate_fn=DataCollatorWithFlattening()."
        )


def lays_end_to_end(collator: Any) -> bool:
    """Whether a collator is known to lay the samples of a batch end to end."""
    return isinstance(collator, DataCollatorWithFlattening) or (_is_trls(collator) and collator.padding_free)


def _is_trls(collator: Any) -> bool:
    trl = sys.modules.get("trl.trainer.sft_trainer")
    return trl is not None and type(collator) is trl.DataCollatorForLanguageModeling


def _laid_end_to_end(collator: Any) -> Any:
    """The collator, if it lays samples end to end. TRL's own collator is switched to that mode.

    Raises:
        ValueError: it is another collator.
    """
    if lays_end_to_end(collator):
        return collator
    if _is_trls(collator):
        return dataclasses.replace(collator, padding_free=True)
    raise ValueError(
        "pack_to= needs a collator that lays samples end to end, with position ids that restart, but the trainer has "
        f"a {type(collator).__name__}. Use Trainer(data_collator=DataCollatorWithFlattening()) of transformers, or "
        "SFTTrainer with its own collator."
    )
