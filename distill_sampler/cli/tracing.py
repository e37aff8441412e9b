"""`distill-sampler trace`: three models read the same responses; each sentence gets a class, a row and a colour.

The models are loaded one after the other, never two at once. What each has read is kept in a folder beside the table,
so that a run that failed at the last model, or is repeated with other thresholds, reads nothing twice.
"""

from __future__ import annotations

import io
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from distill_sampler import ModelReader, Provenance
from distill_sampler.column_names import VERDICTS
from distill_sampler.engines.stored_teacher import StoredTeacher
from distill_sampler.integrations.loading import (
    load_model,
    load_tokenizer,
    locate,
    model_files,
    pick_device,
    pick_dtype,
)
from distill_sampler.metrics.provenance import CLASSES
from distill_sampler.policies.keep_correct import is_correct
from distill_sampler.progress import progress_of
from distill_sampler.report.trace_page import write_trace
from distill_sampler.serialize import hash_of, require_writable, write_atomically
from distill_sampler.sources.candidates import Candidate, Layout, read_candidates
from distill_sampler.sources.files import Bad, Sources
from distill_sampler.tracing import MODELS, Response, TokenLogProbs, Trace, read_responses, read_store, trace
from distill_sampler.types import Missing


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's options."""

    data: Sequence[str]
    teacher: str
    student: str
    distilled: str
    output: Path = Path("trace.html")
    table: Path = Path("trace.parquet")
    layout: Layout = field(default_factory=Layout)
    correct: str | None = None
    """Column that tells whether a response is correct."""
    split: str = "train"
    subset: str | None = None
    alpha: float = 0.1
    beta: float = 0.1
    bytes_per_token: float | None = None
    plain: bool = False
    dtype: str = "auto"
    device: str = "auto"
    batch_tokens: int | None = None
    shown: int = 30
    """Responses on the page; the table has all."""
    skip_bad: bool = False
    trust_remote_code: bool = False


def run(options: Options) -> Trace:
    """Trace the responses, print the counts, and write the page and the table.

    Raises:
        ValueError: an option, the data or a model cannot be used. What models have read by then is kept.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # dependencies raise these about one another
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    say = Console(stderr=True, soft_wrap=True)
    # first, everything that can be refused before a model is loaded
    provenance = Provenance(alpha=options.alpha, beta=options.beta, bytes_per_token=options.bytes_per_token)
    require_writable(options.output, ".html", ".htm")
    require_writable(options.table, ".parquet")
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    names = {name: str(getattr(options, name)) for name in MODELS}
    stored = StoredTeacher(names["teacher"]) if names["teacher"].endswith(".arrow") else None
    loaded = {name: model for name, model in names.items() if stored is None or name != "teacher"}
    folders = {name: locate(model) for name, model in loaded.items()}
    tokenizers = {
        name: load_tokenizer(
            model, revision=folders[name][1], chat_template=None, trust_remote_code=options.trust_remote_code
        )
        for name, model in loaded.items()
    }
    responses = _responses(options, say, key=None if stored is None else stored.key_column)
    kept = options.table.with_name(f"{options.table.stem}.readings")
    readings: dict[str, list[TokenLogProbs | Missing]] = {}
    if stored is not None:
        readings["teacher"] = read_store(stored, responses)
    for name in loaded:
        folder, commit = folders[name]
        identity = _identity(options, model_files(folder, None), responses, f"{dtype} {device.type}")
        earlier = _kept(kept / f"{name}.npz", identity, len(responses))
        if earlier is not None:
            readings[name] = earlier
            say.print(f"The {name}'s readings are kept from an earlier run.")
            continue
        model = load_model(
            names[name], revision=commit, dtype=dtype, device=device, trust_remote_code=options.trust_remote_code
        )
        with progress_of(f"The {name} reads") as bar:
            readings[name] = read_responses(
                ModelReader(model, batch_tokens=options.batch_tokens),
                responses,
                tokenizer=tokenizers[name],
                plain=options.plain,
                progress=bar.update,
            )
        _keep(kept / f"{name}.npz", identity, readings[name])
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    found = trace(responses, readings, provenance=provenance)
    if not found.traced:
        _, who, why = found.left_out[0]
        raise ValueError(
            f"No response could be read by all three models. The reason for the first one and the {who}: {why.reason}. "
            "Give shorter responses, or models with more positions."
        )
    pq.write_table(found.table(), options.table)
    write_trace(found, options.output, models=names, shown=options.shown)
    show(found, say)
    say.print(f"{options.output}: open it in a browser. {options.table}: one row for each sentence.", markup=False)
    return found


def _responses(options: Options, say: Console, *, key: str | None = None) -> list[Response]:
    """The responses of the data.

    Raises:
        ValueError: a row cannot be used, or none can.
    """
    layouts: list[Layout] = []
    sources = Sources(options.data, split=options.split, subset=options.subset)
    responses, bad = [], 0
    for item in read_candidates(sources, options.layout, announce=layouts.append):
        if isinstance(item, Candidate) and item.text is not None:
            item = Bad(
                where=item.where, reason="prompt and response are one text; give them as two columns or messages"
            )
        if isinstance(item, Bad):
            if not options.skip_bad:
                raise ValueError(f"{item.where}: {item.reason}. Repair the row, or leave it out with --on-error skip.")
            bad += 1
            continue
        responses.append(_response(item, options.correct, key))
    if not responses:
        raise ValueError(f"None of the {bad} rows could be used.")
    say.print(f"{len(responses):,} responses ({layouts[0].describe()}).", markup=False)
    if bad:
        say.print(f"[yellow]note:[/] bad rows, left out: {bad:,}.")
    if options.correct is not None and all(each.correct is None for each in responses):
        raise ValueError(f"--correct-column: no row has a value in a column '{options.correct}'.")
    return responses


def _response(candidate: Candidate, correct: str | None, key: str | None) -> Response:
    """A candidate's last turn of the assistant, after all messages before it."""
    last = max(place for place, message in enumerate(candidate.messages) if message["role"] == "assistant")
    name = correct or next((name for name in VERDICTS if name in candidate.extra), "")
    verdict = candidate.extra.get(name)
    return Response(
        where=candidate.where,
        prompt=tuple(candidate.messages[:last]),
        text=str(candidate.messages[last]["content"]),
        correct=None if verdict is None or verdict != verdict else is_correct(verdict, name),
        key=None if key is None else candidate.extra.get(key),
    )


# ---- What models have read ----


def _identity(options: Options, files: Any, responses: Sequence[Response], numerics: str) -> str:
    """A hash of all that a model's readings depend on."""
    read = [[list(each.prompt), each.text] for each in responses]
    content = [files, options.plain, numerics, read]
    return hash_of(json.dumps(content, sort_keys=True, default=str).encode(errors="surrogatepass"))


def _keep(path: Path, identity: str, readings: Sequence[TokenLogProbs | Missing]) -> None:
    """Write what a model has read."""
    found = [each for each in readings if isinstance(each, TokenLogProbs)]
    empty = np.zeros(0)
    content = io.BytesIO()
    np.savez(
        content,
        identity=np.array(identity),
        missing=np.array([int(each) if isinstance(each, Missing) else -1 for each in readings]),
        lengths=np.array([len(each.begins) for each in found], np.int64),
        begins=np.concatenate([empty.astype(np.int64), *(each.begins for each in found)]),
        surprisal=np.concatenate([empty.astype(np.float32), *(each.surprisal for each in found)]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def _kept(path: Path, identity: str, count: int) -> list[TokenLogProbs | Missing] | None:
    """What a model has read in an earlier run; None if nothing is kept of this model and these responses."""
    try:
        kept = dict(np.load(path, allow_pickle=False))
    except (OSError, ValueError):
        return None
    if str(kept["identity"]) != identity:
        return None
    edges = np.cumsum(kept["lengths"])[:-1]
    parts = zip(np.split(kept["begins"], edges), np.split(kept["surprisal"], edges), strict=True)
    found: list[TokenLogProbs | Missing] = []
    for code in kept["missing"].tolist():
        if code >= 0:
            found.append(Missing(code))
        else:
            begins, surprisal = next(parts)
            found.append(TokenLogProbs(begins=begins, surprisal=surprisal))
    assert len(found) == count
    return found


# ---- Telling ----


def show(found: Trace, say: Console) -> None:
    """Print the counts: classes, thresholds, positions, what was left out."""
    table = Table(title=f"{found.num_sentences:,} sentences of {len(found.traced):,} responses")
    for name in ("", *CLASSES):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("share of sentences", *_percent(found.shares))
    for value, shares in found.sensitivity().items():
        table.add_row(f"  at alpha = beta = {value}", *_percent(shares))
    for correct, name in ((True, "correct"), (False, "incorrect")):
        if responses := found.of(correct):
            curves = found.curves(correct, bins=3)
            table.add_row(
                f"{name} responses ({len(responses):,})", *_percent(np.nanmean(curves, axis=0)), end_section=False
            )
            for place, row in zip(("first", "middle", "last"), curves, strict=True):
                table.add_row(f"  {place} third", *_percent(row))
    if areas := found.areas():
        table.add_row("area between the two", *(f"{100 * each:.1f}" for each in areas[0]))
        table.add_row("  signed, correct above", *(f"{100 * each:+.1f}" for each in areas[1]))
    say.print(table)
    other = "the models' own tokens" if found.provenance.bytes_per_token else "bytes"
    say.print(
        f"{found.flips:,} sentences ({found.flips / found.num_sentences:.0%}) have another class when probabilities "
        f"are normalised by {other}."
    )
    if found.left_out:
        for (who, why), count in Counter((who, why) for _, who, why in found.left_out).items():
            say.print(f"[yellow]note:[/] responses left out, for the {who} {why.reason}: {count:,}.")


def _percent(shares: Any) -> list[str]:
    return ["–" if np.isnan(share) else f"{100 * share:.1f} %" for share in shares]
