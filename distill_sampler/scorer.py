"""Running the student: samples → views → token-budget batches → statistics → numbers. Training does not notice.

Three things make a forward for scoring cheap and safe:

1. *Only response positions reach the output head.* For the length of a pass the head's `forward` is one that reduces
   the hidden states to statistics (`token_stats`) and returns an empty row of logits. The model is called through its
   root, as the trainer calls it, so wrappers and adapters work as they do in training.
2. *Batches hold tokens, not rows*: sorted by length, the longest first (running out of memory or time shows at once),
   up to `batch_tokens` of them, padding included. Padding goes to the right, where causal attention never looks, so
   no mask is needed.
3. *The student is left as it was*: mode of every module, random state, gradients, the head itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from distill_sampler.dataset import ScoredDataset
from distill_sampler.distributed import Ranks
from distill_sampler.token_stats import LogitTransform, linear, module, token_stats
from distill_sampler.types import FloatArray, IntArray, Metric, TokenStats, View

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """The numbers of some samples, as soon as they are known."""

    indices: IntArray
    """`[samples]` which samples."""
    columns: Mapping[str, FloatArray]
    """`[samples]` each; NaN where the student's logits were not finite."""
    non_finite: IntArray
    """Samples among them with a NaN or infinite logit."""
    tokens: int
    """Tokens that went through the student for them, without padding."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """How the student is run over the samples."""

    batch_tokens: int | None = None
    """Tokens in a batch, padding included; a longer sample gets a batch of its own. None: 2048 on a CPU, else 16384."""
    progress: bool = True
    """Show a bar with tokens a second and the remaining time once a pass takes longer than two seconds, and a table of
    each epoch's plan in the trainer's output."""

    def __post_init__(self) -> None:
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(
                f"Scorer(batch_tokens={self.batch_tokens}): give a positive number of tokens, such as 8192."
            )

    def score(
        self, model: nn.Module, dataset: ScoredDataset, metrics: Sequence[Metric], indices: IntArray
    ) -> Iterator[Scored]:
        """Score samples, longest first, and give them out in blocks as they are done.

        Args:
            model: the student as the host calls it: a causal language model of transformers, wrapped or not.
            dataset: where the samples are.
            metrics: what to compute; equal views of several metrics share one forward.
            indices: `[n]` which samples, in any order. With several processes each must ask for the same; the work is
                shared and every process gets all numbers.

        Raises:
            ValueError: the model has no output head to score with.
        """
        order = indices[np.argsort(-dataset.lengths[indices], kind="stable")]
        ranks = Ranks.current(next(model.parameters()).device)
        bar = tqdm(
            total=int(dataset.lengths[order].sum()),
            desc="Scoring",
            unit="tok",
            unit_scale=True,
            leave=False,
            delay=2,
            dynamic_ncols=True,
            disable=not self.progress or ranks.rank > 0,
        )
        with bar, reading(model) as forward:
            budget = self.batch_tokens or (2048 if forward.device.type == "cpu" else 16384)
            for block in _blocks(order, dataset.lengths, 8 * budget * ranks.world_size):
                yield _score_block(forward, dataset, metrics, block, budget, ranks, bar)


def _score_block(
    forward: Forward,
    dataset: ScoredDataset,
    metrics: Sequence[Metric],
    block: IntArray,
    budget: int,
    ranks: Ranks,
    bar: Any,
) -> Scored:
    """Read some samples: their views, each once, in batches; then every metric's numbers."""
    share = ranks.share(block)
    samples = [dataset.sample(index) for index in block[share].tolist()]
    # wanted[s][m] lists the places in `views` of what metric m needs of sample s
    views: list[View] = []
    wanted: list[list[list[int]]] = []
    for sample in samples:
        places: dict[tuple[bytes, bytes], int] = {}
        wanted.append([])
        for metric in metrics:
            needed = metric.views(sample)
            for view in needed:
                if view.identity not in places:
                    places[view.identity] = len(views)
                    views.append(view)
            wanted[-1].append([places[view.identity] for view in needed])

    lengths = np.array([len(view.input_ids) for view in views], np.int64)
    stats: dict[int, TokenStats] = {}
    batches = list(token_batches(lengths, budget))
    for batch in batches:
        stats.update(zip(batch, forward([views[place] for place in batch]), strict=True))
        bar.update(int(lengths[batch].sum()) * ranks.world_size)
    for _ in range(ranks.most(len(batches)) - len(batches)):
        forward([_IDLE])

    # one row for each sample of the block; a row is filled by the process that read the sample, zero elsewhere
    names = columns_of(metrics)
    rows = np.zeros((len(block), len(names) + 1))
    rows[share, -1] = [sum(lengths[place] for place in {*chain(*places)}) for places in wanted]
    for row, sample, places_of_metrics in zip(share.tolist(), samples, wanted, strict=True):
        numbers: dict[str, float] = {}
        for metric, needed_places in zip(metrics, places_of_metrics, strict=True):
            results = [stats[place] for place in needed_places]
            if all(np.isfinite(stat.surprisal).all() for stat in results):
                numbers.update(metric.reduce(sample, results))
        rows[row, :-1] = [numbers.get(name, np.nan) for name in names]
    rows = ranks.total(rows)
    return Scored(
        indices=block,
        columns={name: rows[:, place].astype(np.float32) for place, name in enumerate(names)},
        non_finite=block[np.isnan(rows[:, :-1]).any(axis=1)],
        tokens=int(rows[:, -1].sum()),
    )


_IDLE = View(input_ids=np.zeros(2, np.int64), scored=np.array([False, True]))
"""What a process reads while others still have batches, so that all take part in every forward."""


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


def _blocks(order: IntArray, lengths: IntArray, block_tokens: int) -> Iterator[IntArray]:
    """Consecutive pieces of `order` of about `block_tokens` tokens: what is read, batched and reported together."""
    block = np.cumsum(lengths[order]) // block_tokens
    yield from np.split(order, np.flatnonzero(np.diff(block)) + 1)


# ---- The student ----


class Forward:
    """Reads views with a student whose output head is swapped for one that gives statistics. Made by `reading`."""

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        self._model = model
        self._head = head
        self.device = next(model.parameters()).device
        self._transform = self._probe()

    def __call__(self, views: Sequence[View]) -> list[TokenStats]:
        """The statistics of each view's scored tokens. One forward of the student."""
        longest = max(len(view.input_ids) for view in views)
        input_ids = np.empty((len(views), longest), np.int64)
        for row, view in enumerate(views):
            input_ids[row, : len(view.input_ids)] = view.input_ids
            input_ids[row, len(view.input_ids) :] = view.input_ids[0]  # never looked at
        # the state at place t predicts token t + 1, so token (row, t) is predicted at flat place row * longest + t - 1
        targets = np.concatenate([row * longest + np.flatnonzero(view.scored) for row, view in enumerate(views)])
        tokens = torch.from_numpy(input_ids).to(self.device)
        flat = torch.from_numpy(targets).to(self.device)
        surprisal, rank = self._run(tokens, flat)
        counts = [int(view.scored.sum()) for view in views]
        bounds = np.cumsum(counts)[:-1]
        return [
            TokenStats(surprisal=s, rank=r)
            for s, r in zip(
                np.split(surprisal.cpu().numpy(), bounds), np.split(rank.cpu().numpy(), bounds), strict=True
            )
        ]

    def _run(self, tokens: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        if self._transform is None:  # the model's own logits; the head is the original
            logits = self._model(input_ids=tokens, use_cache=False).logits
            return token_stats(logits.flatten(0, 1)[flat - 1], tokens.flatten()[flat], _own_logits)
        transform = self._transform
        result: list[tuple[Tensor, Tensor]] = []
        original = self._head.forward

        def reduce(hidden: Tensor) -> Tensor:
            with torch.autocast(hidden.device.type, enabled=False):
                if type(self._head) is nn.Linear:
                    project = linear(self._head.weight, self._head.bias, transform)
                else:
                    project = module(original, transform)
                result.append(token_stats(hidden.flatten(0, 1)[flat - 1], tokens.flatten()[flat], project))
            return hidden.new_zeros(*hidden.shape[:-1], 1)

        with _forward_of(self._head, reduce):
            self._model(input_ids=tokens, use_cache=False)
        (stats,) = result
        return stats

    def _probe(self) -> LogitTransform | None:
        """Find out what the model does to its logits after the head, by showing it logits of our own.

        Nothing is read from names in a configuration: the answer is fitted to what comes out, and checked. None if
        it is nothing that `LogitTransform` describes; then the model's own logits are used.
        """
        shown = torch.tensor([-1e6, -60.0, -5.0, -1e-3, 0.0, 1e-3, 0.5, 20.0, 1e6], device=self.device)
        with _forward_of(self._head, lambda hidden: shown.expand(*hidden.shape[:-1], -1)):
            # two tokens, because a model may drop or treat the last position specially
            seen = self._model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False)
        seen = seen.logits[0, 0].float()
        if seen.shape == shown.shape:
            scale = float(seen[5] / shown[5])
            cap = float(seen[-1])
            capped = abs(cap) < 0.5 * abs(scale) * 1e6
            fitted = LogitTransform(scale=scale, softcap=cap if capped else None)
            if torch.allclose(fitted.apply_(shown.clone()[None])[0], seen, rtol=1e-3, atol=1e-5):
                return fitted
        logger.warning(
            "%s changes its logits in a way that is not a scale or a soft cap; scoring goes through its full logits "
            "and needs more memory.",
            type(unwrap(self._model)).__name__,
        )
        return None


@contextmanager
def reading(model: nn.Module) -> Iterator[Forward]:
    """The student, ready to read views: in evaluation mode, without gradients. Everything is as before afterwards."""
    unwrapped = unwrap(model)
    modes = [(part, part.training) for part in model.modules()]
    device = next(model.parameters()).device
    forked = [device] if device.type == "cuda" else []
    try:
        model.eval()
        with torch.random.fork_rng(devices=forked), torch.no_grad():
            yield Forward(model, unwrapped.get_output_embeddings())
    finally:
        for part, training in modes:
            part.training = training


def unwrap(model: nn.Module) -> Any:
    """The language model inside DDP, DeepSpeed and `torch.compile` wrappers.

    Raises:
        ValueError: there is none with an output head.
    """
    inner: Any = model
    while not callable(getattr(inner, "get_output_embeddings", None)):
        inner = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        if inner is None:
            raise ValueError(
                f"{type(model).__name__} is not a causal language model of transformers: it has no output head "
                "(get_output_embeddings), so there is nothing to score with."
            )
    if inner.get_output_embeddings() is None:
        raise ValueError(
            f"{type(inner).__name__} has no output head. Load the student with AutoModelForCausalLM, not AutoModel."
        )
    return inner


@contextmanager
def _forward_of(head: nn.Module, forward: Any) -> Iterator[None]:
    """Swap a module's `forward` on the instance: hooks that gather sharded weights still run."""
    before = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def _own_logits(logits: Tensor) -> Tensor:
    return logits.to(torch.float32, copy=True)


def columns_of(metrics: Iterable[Metric]) -> list[str]:
    """Every number that the metrics give, once each, in their order."""
    return list(dict.fromkeys(name for metric in metrics for name in metric.columns))
