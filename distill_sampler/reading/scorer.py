"""Running the student over samples: samples → views → token-budget batches → statistics → numbers.

1. *Batches hold tokens, not rows*: sorted by length, the longest first (running out of memory or time shows at once),
   up to `batch_tokens` of them, padding included.
2. *A prompt is read once* for all views that begin with it, where that saves at least a fifth of their tokens: the
   many views of one sample, and the candidates of one prompt, which are read together as a unit, found by comparing
   tokens. A batch of prompts is read first, then the batches of what follows them, sorted by length again: a wave.
3. *Memory is found, not asked for*: the budget starts from what is free, and halves when that was not enough.
4. *What the student has no positions for is not read*: the metric has no score there, and the pass goes on.

A metric may say that it is an approximation: it has an attribute `exact`, the metric that it approximates under another
name (or None). The first pass then begins with both on a few samples, and reports their rank correlation and cost.

How the student reads a batch is in `student.py`, who reads which in `distributed.py`.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from distill_sampler.dataset import ScoredDataset
from distill_sampler.distributed import Ranks
from distill_sampler.reading.in_process import Forward, reading, unwrap
from distill_sampler.reading.token_stats import EXTRAS, Impl, available, fastest
from distill_sampler.types import BoolArray, FloatArray, IntArray, Metric, Sample, TokenStats, View

logger = logging.getLogger(__name__)

_WORTH_SHARING = 5
"""A prompt is read once for several candidates if that saves at least one in so many of their tokens. Going on from
keys and values costs more than reading on: on a CPU, saving 13 % of the tokens made a pass 11 % slower, and saving
18 % made it 6 % faster."""

_BLOCK_BATCHES = 4
"""Batches whose samples are read, sorted and reported together. More would pad a little less where prompts are shared
(2 % from 4 to 8) and report, and keep for an interrupted pass, more rarely."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """The numbers of some samples, as soon as they are known."""

    indices: IntArray
    """`[samples]` which samples."""
    columns: Mapping[str, FloatArray]
    """`[samples]` each; NaN where the student's logits were not finite, or the sample was too long."""
    non_finite: IntArray
    """Samples among them with a NaN or infinite logit."""
    too_long: IntArray
    """Samples among them of which a metric asks for a view of more tokens than the student has positions for."""
    tokens: int
    """Tokens that went through the student for them, without padding."""
    tokens_of: Mapping[str, int]
    """Thereof, by the metrics' names, those of the views that the metric asked for. A view that several metrics ask
    for counts for each of them, as if it were the only one; a prompt that several views share counts in equal parts."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """How the student is run over the samples."""

    batch_tokens: int | None = None
    """Tokens in a batch, padding included; a longer sample gets a batch of its own. None: 2048 on a CPU, else a power
    of two that fits in half of the free memory. Halved when memory runs out (with one process)."""
    ties: Literal["strict", "mid"] = "strict"
    """How other tokens with exactly the same logit count in a rank: not at all, as in the authors' code, or half each,
    which is unbiased. Matters where logits are rounded to bfloat16: there one token in ten is tied."""
    share_prompts: bool = True
    """Read the prompt that several candidates have in common once, where that pays and gives the same numbers."""
    impl: Literal["auto"] | Impl = "auto"
    """How logits become statistics (see `token_stats`). Auto: in Triton on CUDA where that is installed, else compiled
    for passes so long that compiling pays."""
    progress: bool = True
    """Show a bar with tokens a second and the remaining time once a pass takes longer than two seconds, and a table of
    each epoch's plan in the trainer's output."""
    _reported: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """What is said once: how far a metric is from what it approximates, and that samples are too long."""
    _sharing: WeakKeyDictionary[nn.Module, bool] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )
    """Whether prompts may be shared, for students with which it was tried."""

    def __post_init__(self) -> None:
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(
                f"Scorer(batch_tokens={self.batch_tokens}): give a positive number of tokens, such as 8192."
            )
        for argument, value, known in (
            ("ties", self.ties, ("strict", "mid")),
            ("impl", self.impl, ("auto", *get_args(Impl))),
        ):
            if value not in known:
                raise ValueError(f"Scorer({argument}={value!r}): choose one of {', '.join(map(repr, known))}.")

    def score(
        self,
        model: nn.Module,
        dataset: ScoredDataset,
        metrics: Sequence[Metric],
        indices: IntArray,
        *,
        done: BoolArray | None = None,
    ) -> Iterator[Scored]:
        """Score samples, longest first, and give them out in blocks as they are done.

        Args:
            model: the student as the host calls it: a causal language model of transformers, wrapped or not.
            dataset: where the samples are.
            metrics: what to compute; equal views of several metrics share one forward.
            indices: `[n]` which samples, in any order. With several processes each must ask for the same; the work is
                shared and every process gets all numbers.
            done: `[samples of the data set]` True where an interrupted pass has given numbers already. Blocks that are
                all done are left out; the others are what they were.

        Raises:
            ValueError: the model has no output head to score with.
        """
        if len(indices) == 0:
            return
        for metric in metrics:
            if (exact := getattr(metric, "exact", None)) and repr(metric) not in self._reported:
                self._reported.add(repr(metric))
                self._report(model, dataset, metric, exact, indices)
        device = next(model.parameters()).device
        ranks = Ranks.current(device)
        vocab = unwrap(model).config.get_text_config().vocab_size
        impl = self._impl(device, int(dataset.num_scored[indices].sum()) * vocab)
        bar = tqdm(
            total=int(dataset.lengths[indices].sum()),
            desc="Scoring",
            unit="tok",
            unit_scale=True,
            leave=False,
            delay=2,
            dynamic_ncols=True,
            disable=not self.progress or ranks.rank > 0,
        )
        with bar, reading(model, extras=extras_of(metrics), impl=impl, mid_ranks=self.ties == "mid") as forward:
            # the smallest of the processes' budgets: all must cut the same blocks
            budget = self.batch_tokens or -ranks.most(-_affordable_tokens(model, device))
            units = _units(dataset, indices, budget) if self.share_prompts else np.arange(len(indices))
            # the unit with the longest sample first, and in each unit the longest first
            longest = np.zeros(units.max() + 1, np.int64)
            np.maximum.at(longest, units, dataset.lengths[indices])
            order = np.lexsort((-dataset.lengths[indices], units, -longest[units]))
            indices, units = indices[order], units[order]
            work = _Pass(
                forward=forward,
                dataset=dataset,
                metrics=metrics,
                ranks=ranks,
                bar=bar,
                indices=indices,
                budget=budget,
                sharing=self._sharing.get(model) if self.share_prompts else False,
            )
            for block in _blocks(dataset.lengths[indices], units, _BLOCK_BATCHES * budget * ranks.world_size):
                if done is not None and done[indices[block]].all():
                    bar.update(int(dataset.lengths[indices[block]].sum()))
                    continue
                scored = work.score(indices[block], units[block])
                if work.sharing is not None and self.share_prompts:
                    self._sharing[model] = work.sharing
                yield scored
            if work.too_long and ranks.rank == 0 and "too long" not in self._reported:
                self._reported.add("too long")
                logger.warning("%s", work.too_long_sentence())

    def numerics(self, model: nn.Module) -> dict[str, str]:
        """What, besides the weights, decides the scores beyond rounding in the last bits: scores that differ in it
        must not be compared or mixed.

        Found out with one forward of two tokens: with several processes all must ask.

        Returns:
            `dtype` (what the student computes in, autocast included), `head` (how the product with the output head is
            made), `ties` (the rule), and `quantization` where there is one.
        """
        with reading(model, mid_ranks=self.ties == "mid") as forward:
            return forward.numerics

    def _report(
        self, model: nn.Module, dataset: ScoredDataset, metric: Metric, exact: Metric, indices: IntArray
    ) -> None:
        """Say how an approximation orders samples that it and the exact metric score: up to 64, or an eighth of all."""
        some = np.unique(np.linspace(0, len(indices) - 1, min(64, max(16, len(indices) // 8))).astype(int))
        pairs: list[FloatArray] = []
        tokens = np.zeros(2)
        for scored in self.score(model, dataset, [metric, exact], np.sort(indices)[some]):
            pairs.append(np.stack([scored.columns[metric.name], scored.columns[exact.name]]))
            tokens += [scored.tokens_of[metric.name], scored.tokens_of[exact.name]]
        pair = np.concatenate(pairs, axis=1)
        pair = pair[:, np.isfinite(pair).all(axis=0)]
        if Ranks.of(model).rank == 0 and pair.shape[1] > 2:
            logger.warning(
                "%r is an approximation: on %d samples its rank correlation with the exact score is %.3f, at %.0f %% "
                "of the tokens.",
                metric,
                pair.shape[1],
                np.asarray(np.corrcoef(np.argsort(np.argsort(pair))))[0, 1],
                100 * tokens[0] / tokens[1],
            )

    def _impl(self, device: torch.device, logits: int) -> Impl:
        return fastest(device, logits) if self.impl == "auto" else available(self.impl, device)


@dataclass(kw_only=True, eq=False)
class _Pass:
    """One pass over samples: what stays the same from block to block, and what is found out on the way."""

    forward: Forward
    dataset: ScoredDataset
    metrics: Sequence[Metric]
    ranks: Ranks
    bar: Any
    indices: IntArray
    """All samples of the pass, the shortest last."""
    budget: int
    """Tokens in a batch, from here on."""
    sharing: bool | None
    """Whether prompts may be shared; None: nobody wanted to yet."""
    too_long: list[tuple[int, str]] = field(default_factory=list)
    """Samples with a view longer than the student's positions, and the metric that asked for it."""

    def score(self, block: IntArray, units: IntArray) -> Scored:
        """Read some samples: their views, each once, in batches; then every metric's numbers.

        Args:
            block: which samples.
            units: `[samples]` the number of each sample's unit; the samples of a unit are read by one process.
        """
        unit = np.unique(units, return_inverse=True)[1]
        tokens_of_unit = np.bincount(unit, self.dataset.lengths[block]).astype(np.int64)
        share = np.flatnonzero(np.isin(unit, self.ranks.share(tokens_of_unit)))
        samples = self.dataset.samples(block[share])
        # wanted[s][m] lists the places in `views` of what metric m needs of sample s; None: that is too long to read
        views: list[View] = []
        prompts: list[IntArray | None] = []
        wanted: list[list[list[int] | None]] = []
        for sample in samples:
            places: dict[tuple[bytes, bytes], int] = {}
            wanted.append([])
            for metric in self.metrics:
                needed = metric.views(sample)
                if any(len(view.input_ids) > self.forward.positions for view in needed):
                    wanted[-1].append(None)
                    continue
                for view in needed:
                    if view.identity not in places:
                        places[view.identity] = len(views)
                        views.append(view)
                        prompts.append(_prompt_of(view, sample))
                wanted[-1].append([places[view.identity] for view in needed])
        stats, tokens = self._read(views, prompts, int(self.dataset.lengths[block].sum()))

        # one row for each sample of the block; a row is filled by the process that read the sample, zero elsewhere
        names = columns_of(self.metrics)
        columns = np.zeros((len(block), len(names)))
        tokens_of, too_long = np.zeros((2, len(block), len(self.metrics)))
        tokens_of_all = np.zeros((len(block), 1))
        for row, sample, places_of_metrics in zip(share.tolist(), samples, wanted, strict=True):
            numbers_of_sample: dict[str, float] = {}
            for number, (metric, needed_places) in enumerate(zip(self.metrics, places_of_metrics, strict=True)):
                if needed_places is None:
                    too_long[row, number] = bool(metric.columns)  # nothing is missing where nothing is computed
                    continue
                results = [stats[place] for place in needed_places]
                if all(np.isfinite(stat.surprisal).all() for stat in results):
                    numbers_of_sample.update(metric.reduce(sample, results))
                tokens_of[row, number] = tokens[sorted(set(needed_places))].sum()
            columns[row] = [numbers_of_sample.get(name, np.nan) for name in names]
            tokens_of_all[row] = tokens[sorted({p for places in places_of_metrics for p in places or ()})].sum()
        every = self.ranks.total(np.concatenate([columns, tokens_of, too_long, tokens_of_all], axis=1))
        columns, tokens_of, too_long, tokens_of_all = np.split(
            every, np.cumsum([len(names), len(self.metrics), len(self.metrics)]), axis=1
        )
        missing = np.zeros(len(block), bool)
        for number, metric in enumerate(self.metrics):
            of_metric = columns[:, [names.index(name) for name in metric.columns]]
            missing |= np.isnan(of_metric).any(axis=1) & (too_long[:, number] == 0)
            self.too_long += [(index, metric.name) for index in block[too_long[:, number] > 0].tolist()]
        return Scored(
            indices=block,
            columns={name: columns[:, place].astype(np.float32) for place, name in enumerate(names)},
            non_finite=block[missing],
            too_long=block[too_long.any(axis=1)],
            tokens=round(tokens_of_all.sum()),
            tokens_of={
                metric.name: round(total)
                for metric, total in zip(self.metrics, tokens_of.sum(axis=0).tolist(), strict=True)
            },
        )

    def _read(
        self, views: Sequence[View], prompts: Sequence[IntArray | None], progress: int
    ) -> tuple[dict[int, TokenStats], FloatArray]:
        """The statistics of all views, by their places, and `[views]` how many tokens went through the student for
        each: its own, and its part of a prompt that it shares. `progress` is what the bar goes on by."""
        stats: dict[int, TokenStats] = {}
        tokens = np.zeros(len(views))
        waves = self._plan(views, prompts)
        # agreed on before the first forward: afterwards, others may still wait for this process inside one
        forwards = sum(len(wave.batches) + bool(wave.prompts) for wave in waves)
        idle = self.ranks.most(forwards) - forwards
        length = sum(len(view.input_ids) for view in views)
        while waves:
            wave = waves.pop(0)
            sharing = Counter(wave.row.values())
            try:
                prefix = self.forward.prefix(wave.prompts) if wave.prompts else None
                for batch in wave.batches:
                    rows = [wave.row[place] for place in batch] if prefix else ()
                    stats.update(zip(batch, self.forward([views[p] for p in batch], prefix, rows), strict=True))
                    for place in batch:
                        tokens[place] = len(views[place].input_ids)
                    for place, row in zip(batch, rows, strict=bool(rows)):
                        tokens[place] -= len(wave.prompts[row]) * (1 - 1 / sharing[row])
                    self.bar.update(progress * sum(len(views[place].input_ids) for place in batch) / length)
            except torch.OutOfMemoryError:
                left = [place for place in range(len(views)) if place not in stats]
                if self.ranks.world_size > 1 or self.budget <= max(len(views[place].input_ids) for place in left):
                    raise  # others wait inside their forwards; or this was a single sequence already
                self.budget //= 2
                logger.warning("Out of memory: batches are at most %d tokens from here on.", self.budget)
            else:
                continue
            # outside of the handler, where the traceback does not hold the failed forward's tensors any more
            prefix = None
            if self.forward.device.type == "cuda":
                torch.cuda.empty_cache()
            places = np.array(left)
            waves = [
                wave.renumbered(places) for wave in self._plan([views[p] for p in left], [prompts[p] for p in left])
            ]
        for _ in range(idle):
            self.forward([_IDLE])
        return stats, tokens

    def _plan(self, views: Sequence[View], prompts: Sequence[IntArray | None]) -> list[_Wave]:
        """What is read with what. Whether prompts can be shared is tried when it first would pay for some process."""
        waves = list(_waves(views, prompts, self.budget))
        if self.sharing is None and self.ranks.most(int(any(wave.prompts for wave in waves))):
            self.sharing = _can_share(self.forward, self.dataset.samples(self.indices[-64:]))
        return list(_waves(views, [None] * len(views), self.budget)) if self.sharing is False else waves

    def too_long_sentence(self) -> str:
        """What was not read, and what to do about it."""
        samples = {index for index, _ in self.too_long}
        names = ", ".join(dict.fromkeys(name for _, name in self.too_long))
        return (
            f"Without {names}: {len(samples)} of the samples (first: sample {min(samples)}), because it takes more "
            f"tokens at once than the {self.forward.positions} that the student has positions for. Cut the samples "
            "(max_length of the trainer), or score them with LocalNaturalness, which reads a few steps at a time; if "
            "the student does read farther, raise max_position_embeddings of its config."
        )


_IDLE = View(input_ids=np.zeros(2, np.int64), scored=np.array([False, True]))
"""What a process reads while others still have batches, so that all take part in every forward."""


# ---- Who is read with whom ----


@dataclass(frozen=True, kw_only=True, eq=False)
class _Wave:
    """A batch of prompts, and the batches that continue them. Without prompts: batches of whole sequences."""

    prompts: Sequence[IntArray] = ()
    row: Mapping[int, int] = field(default_factory=dict)
    """For each view, by its place, the number of its prompt."""
    batches: Sequence[Sequence[int]]
    """Places of views."""

    def renumbered(self, places: IntArray) -> _Wave:
        """The same for views that lie at other places: `places[old] = new`."""
        return _Wave(
            prompts=self.prompts,
            row={int(places[old]): row for old, row in self.row.items()},
            batches=[places[batch].tolist() for batch in self.batches],
        )


def _waves(views: Sequence[View], prompts: Sequence[IntArray | None], budget: int) -> Iterator[_Wave]:
    """Whole sequences first; then, if it saves as much as a forward costs, those that share prompts."""
    members: dict[bytes, list[int]] = {}
    for place, prompt in enumerate(prompts):
        if prompt is not None:
            members.setdefault(prompt.tobytes(), []).append(place)
    groups: list[tuple[IntArray, list[int]]] = []
    saved = 0
    for key, places_of_group in members.items():
        prompt = np.frombuffer(key, np.int64)
        saves = (len(places_of_group) - 1) * len(prompt)
        if saves and saves * _WORTH_SHARING >= sum(len(views[place].input_ids) for place in places_of_group):
            groups.append((prompt, places_of_group))
            saved += saves
    if saved * 8 < budget:  # a forward more costs about as much as an eighth of a batch
        groups = []
    alone = np.array(sorted(set(range(len(views))) - {place for _, group in groups for place in group}), np.int64)
    if len(alone):
        lengths = np.array([len(views[place].input_ids) for place in alone])
        yield _Wave(batches=[alone[batch].tolist() for batch in token_batches(lengths, budget)])
    starts = np.array([len(prompt) for prompt, _ in groups], np.int64)
    for some in token_batches(starts, budget):
        row = {place: number for number, group in enumerate(some) for place in groups[group][1]}
        places = np.array(list(row), np.int64)
        start = np.array([starts[some[number]] for number in row.values()])
        # keys and values of a prompt take memory in each row that continues it, less than a token that is read
        lengths = np.array([len(views[place].input_ids) for place in row]) - start + start // 4
        yield _Wave(
            prompts=[groups[group][0] for group in some],
            row=row,
            batches=[places[batch].tolist() for batch in token_batches(lengths, budget)],
        )


def _prompt_of(view: View, sample: Sample) -> IntArray | None:
    """What the view may share: the beginning of its sample, if the view has it too and nothing in it is scored."""
    prompt = _beginning(sample)
    begins = view.input_ids[: len(prompt)]
    if len(prompt) == 0 or view.scored[: len(prompt) + 1].any() or not np.array_equal(begins, prompt):
        return None
    return prompt


def _units(dataset: ScoredDataset, indices: IntArray, budget: int) -> IntArray:
    """`[n]` numbers that are equal where samples should be read together: those that share a prompt worth sharing.

    Units of more tokens than a few batches are cut, so that several processes find work in one block.
    """
    group, prompt = _prompts(dataset, indices)
    lengths = dataset.lengths[indices]
    members, tokens = np.bincount(group)[group], np.bincount(group, lengths)[group]
    shares = (members > 1) & ((members - 1) * prompt * _WORTH_SHARING >= tokens)
    by_group = np.argsort(group, kind="stable")
    before = np.cumsum(lengths[by_group]) - lengths[by_group]
    first = np.r_[True, np.diff(group[by_group]) != 0]
    before -= np.maximum.accumulate(np.where(first, before, 0))  # tokens before it in its group
    piece = np.empty_like(group)
    piece[by_group] = before // (_BLOCK_BATCHES * budget)
    keys = np.stack([group, piece, np.where(shares, -1, np.arange(len(indices)))])
    units: IntArray = np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)
    return units


def _prompts(dataset: ScoredDataset, indices: IntArray) -> tuple[IntArray, IntArray]:
    """`[n]` numbers that are equal for equal prompts, and `[n]` how many of their tokens can be read in advance: all
    but the last, which predicts the first scored token."""
    numbers: dict[bytes, int] = {}
    group, length = np.empty((2, len(indices)), np.int64)
    for start in range(0, len(indices), 1024):
        for place, sample in enumerate(dataset.samples(indices[start : start + 1024]), start):
            prompt = _beginning(sample)
            key = hashlib.blake2b(prompt.tobytes(), digest_size=16).digest()
            group[place], length[place] = numbers.setdefault(key, len(numbers)), len(prompt)
    return group, length


def _beginning(sample: Sample) -> IntArray:
    """The tokens before the one that predicts the first scored token."""
    return sample.input_ids[: max(0, int(sample.scored.argmax()) - 1)]


def _can_share(forward: Forward, samples: Sequence[Sample]) -> bool:
    """Try it on the beginnings of the two last samples with different prompts. The same two on every process."""
    views: dict[bytes, tuple[View, int]] = {}
    for sample in reversed(samples):
        start = len(_beginning(sample))
        stop = int(min(start + 64, len(sample.input_ids), forward.positions))
        if 0 < start < stop - 1 and len(views) < 2:
            view = View(input_ids=sample.input_ids[:stop], scored=sample.scored[:stop])
            views.setdefault(sample.input_ids[:start].tobytes(), (view, start))
    if not views:
        return False
    return forward.can_share([view for view, _ in views.values()], [start for _, start in views.values()])


def token_batches(lengths: IntArray, batch_tokens: int) -> Iterator[list[int]]:
    """Places of `lengths` in batches of at most `batch_tokens` padded tokens, the longest first.

    `lengths [5, 9, 4], batch_tokens 10 -> [1], [0, 2]`: 9 alone, then two rows of 5 with the 4 padded.
    """
    batch: list[int] = []
    for place in np.argsort(-lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _blocks(lengths: IntArray, units: IntArray, block_tokens: int) -> Iterator[slice]:
    """Consecutive pieces of about `block_tokens` tokens that cut no unit: what is read and reported together."""
    begins = np.r_[True, np.diff(units) != 0]
    block = (np.cumsum(lengths) - lengths) // block_tokens
    block = np.maximum.accumulate(np.where(begins, block, 0))
    bounds = np.r_[0, np.flatnonzero(np.diff(block)) + 1, len(block)]
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        yield slice(start, stop)


def _affordable_tokens(model: nn.Module, device: torch.device) -> int:
    """Tokens in a batch that half of the free memory should hold: a power of two, so that it seldom changes."""
    if device.type != "cuda":
        return 2048 if device.type == "cpu" else 16384
    # without gradients a token takes the activations of about one layer, and some for keys, values and masks
    hidden = int(unwrap(model).config.get_text_config().hidden_size)
    free, _ = torch.cuda.mem_get_info(device)
    tokens = free // 2 // (64 * hidden * next(model.parameters()).element_size())
    return int(2 ** np.clip(np.floor(np.log2(max(tokens, 1))), 10, 16))


def columns_of(metrics: Iterable[Metric]) -> list[str]:
    """Every number that the metrics give, once each, in their order."""
    return list(dict.fromkeys(name for metric in metrics for name in metric.columns))


def extras_of(metrics: Iterable[Metric]) -> list[str]:
    """The statistics that metrics ask for beside surprisal, rank and ties: `uses_statistics`, if they have it.

    Raises:
        ValueError: one asks for something that there is not.
    """
    names: list[str] = []
    for metric in metrics:
        for name in getattr(metric, "uses_statistics", ()):
            if name in EXTRAS:
                names.append(name)
            elif name not in ("surprisal", "rank", "ties"):
                raise ValueError(
                    f"{type(metric).__name__} uses the statistic '{name}'; there are surprisal, rank, ties, "
                    f"{', '.join(EXTRAS)}."
                )
    return sorted(set(names))
