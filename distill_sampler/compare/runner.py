"""Runs arms × seeds one after the other. Each writes one small file, so that a comparison that is killed goes on.

Several processes may work on one folder: each run is locked by the one that has it. Under `accelerate launch`, the
processes train and read together instead.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from distill_sampler.compare.arms import Arm, Chooser, teacher_counts
from distill_sampler.compare.budget import Budget
from distill_sampler.compare.candidates import Candidates
from distill_sampler.compare.generated import Verifier, solved
from distill_sampler.compare.measures import Answer
from distill_sampler.compare.student import Training, give_back_memory, read, scores_of, train
from distill_sampler.distributed import Ranks
from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics import Random
from distill_sampler.protocols import Metric, Pool
from distill_sampler.serialize import described, differences, write_atomically
from distill_sampler.types import FloatArray, unknown_name

_CHUNK = 32
"""Prompts that are scored between two writes."""


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Run:
    """What one arm with one seed did, and what was measured."""

    arm: str
    """The arm's name."""
    seed: int
    """The seed."""
    samples: int
    """Samples trained on, repetitions included."""
    distinct: int
    """Different samples among them."""
    response_tokens: int
    """Response tokens trained on."""
    tokens: int
    """All tokens trained on, prompts included."""
    steps: int
    """Optimizer steps."""
    teachers: Mapping[str, int]
    """Samples of each teacher."""
    plan: str
    """Fingerprint of what was trained on, in order."""
    rescored_tokens: int
    """Tokens that were read to score again during the run."""
    answers: tuple[Answer, ...]
    """The held-out responses with their losses."""
    seconds: Mapping[str, float]
    """Time of training, of reading the held-out responses and of scoring again. Not part of any comparison."""
    solved: Mapping[str, bool] = field(default_factory=dict)
    """By held-out prompt, whether the student's own answer solves it; empty without a verifier."""

    def as_json(self) -> str:
        """The run as JSON on one line; losses have 6 digits behind the point."""
        answers = [[a.prompt, a.teacher, a.correct, round(a.loss, 6)] for a in self.answers]
        mappings = {"teachers": dict(self.teachers), "solved": dict(self.solved)}
        return json.dumps({**vars(self), **mappings, "answers": answers}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Run:
        """What `as_json` wrote."""
        values = json.loads(text)
        answers = tuple(Answer(prompt=p, teacher=t, correct=c, loss=v) for p, t, c, v in values.pop("answers"))
        return cls(answers=answers, **values)


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Arms × seeds on one student and one data set, and the folder that keeps them."""

    folder: Path
    candidates: Candidates
    tokenizer: Any
    load: Callable[[], Any]
    """Gives a fresh student."""
    arms: Mapping[str, Arm]
    subject: Arm
    metrics: Mapping[str, Metric]
    """What the arms' policies read, by name."""
    seeds: int
    budget: Budget
    training: Training
    held_out: int
    train_prompts: int | None
    margin: float
    identity: Mapping[str, str]
    """Hashes of the student's files and of the data."""
    ranks: Ranks
    say: Callable[[str], None]
    verify: Verifier | None = None
    """Judges the student's own answers to held-out prompts; None: it does not write any."""
    verified_by: str = ""
    """What the user typed for it."""
    end_token_ids: Sequence[int] = ()
    """The end-of-turn markers, where such an answer ends."""
    max_new_tokens: int = 512
    """Of such an answer."""

    def facts(self) -> dict[str, Any]:
        """Everything that a run's numbers depend on, other than its arm and seed."""
        return {
            **self.identity,
            "data set": self.candidates.dataset.fingerprint,
            "prompts": len(self.candidates.prompts),
            "budget": asdict(self.budget),
            "training": asdict(self.training),
            "held_out": self.held_out,
            "train_prompts": self.train_prompts,
            "subject": described(self.subject),
            "subject name": self.subject.name,
            "margin": self.margin,
            "processes": self.ranks.world_size,
            **({"verifier": self.verified_by, "max_new_tokens": self.max_new_tokens} if self.verify else {}),
        }

    def run(self) -> bool:
        """Make every run that is not there yet. Returns whether all are there, or other processes have the rest.

        Raises:
            ValueError: the folder holds a comparison with other settings, there are not enough prompts, or an arm
                cannot be planned.
        """
        self.split(0)  # refuses too few prompts before the folder is bound to these settings
        self._begin()
        wanted = [(arm, seed) for seed in range(self.seeds) for arm in self.arms.values()]
        missing = [(arm, seed) for arm, seed in wanted if not self.path(arm, seed).exists()]
        if not missing:
            return True
        scores = self.scores()
        # all plans first, so that an arm that cannot be planned is refused before hours of training
        for seed in sorted({seed for _, seed in missing}):
            for arm in (arm for arm, other in missing if other == seed and arm.kind != "untrained"):
                self.chooser(seed, scores).plan(arm)
        for number, (arm, seed) in enumerate(missing, 1):
            with self._claimed(self.path(arm, seed).with_suffix(".lock")) as mine:
                if not mine or self.path(arm, seed).exists():
                    continue
                run = self._one(arm, seed, scores)
                give_back_memory()
                if self.ranks.rank == 0:
                    write_atomically(self.path(arm, seed), run.as_json().encode())
                seconds = ", ".join(f"{name} {value:.0f} s" for name, value in run.seconds.items())
                self.say(f"{number}/{len(missing)}  {arm.name}, seed {seed}: {run.samples} samples, {seconds}")
        return all(self.path(arm, seed).exists() for arm, seed in wanted)

    def path(self, arm: Arm, seed: int) -> Path:
        """The file of a run."""
        return self.folder / "runs" / f"{arm.name}-{seed}.json"

    def _begin(self) -> None:
        """Compare the folder's settings with these, or write them."""
        for part in ("runs", "scores"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        path, facts = self.folder / "comparison.json", json.loads(json.dumps(self.facts()))
        own = {name: described(arm) for name, arm in self.arms.items()}
        kept: dict[str, Any] = {"facts": facts, "arms": {}}
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            changed = {name: text for name, text in own.items() if kept["arms"].get(name, text) != text}
            if kept["facts"] != facts or changed:
                what = differences(kept["facts"], facts) or f"the arm {', '.join(changed)}"
                raise ValueError(
                    f"--output {self.folder} holds a comparison with other settings ({what}). Give another folder, or "
                    "the same settings."
                )
        self.ranks.gather(0)  # every process has looked before one writes
        if self.ranks.rank == 0:
            kept["arms"] |= own
            write_atomically(path, json.dumps(kept, indent=1, sort_keys=True).encode())

    def _one(self, arm: Arm, seed: int, scores: Mapping[str, FloatArray]) -> Run:
        model = self.load()
        training_rows, held_out = self.split(seed)
        dataset = self.candidates.dataset
        planned, spent, optimizers = [], {"training": 0.0}, (None, None)
        steps = rescored = 0
        for around in range(arm.rounds if arm.kind != "untrained" else 0):
            if around:
                metrics = [self.metrics[name] for name in arm.uses_metrics]
                fresh, tokens, seconds = scores_of(model, dataset, metrics, training_rows, self.training)
                scores = {**scores, **fresh}
                rescored += tokens
                spent["scoring"] = spent.get("scoring", 0.0) + seconds
            plan = self.chooser(seed, scores).plan(arm, around=around)
            seconds, taken, optimizers = train(
                model, self.tokenizer, dataset, plan, self.training, seed=seed, optimizers=optimizers
            )
            planned.append(plan)
            spent["training"] += seconds
            steps += taken
        answers, spent["measuring"] = read(model, self.candidates, held_out, self.training)
        solves: dict[str, bool] = {}
        if self.verify is not None:
            solves, spent["answering"] = solved(
                model,
                self.tokenizer,
                self.candidates,
                held_out,
                self.verify,
                end_token_ids=self.end_token_ids,
                max_new_tokens=self.max_new_tokens,
                training=self.training,
                ranks=self.ranks,
            )
        indices = np.concatenate([np.zeros(0, np.int64), *(plan.indices for plan in planned)])
        counts: dict[str, int] = {}
        for plan in planned:
            for teacher, count in teacher_counts(plan, self._pool(scores)).items():
                counts[teacher] = counts.get(teacher, 0) + count
        return Run(
            arm=arm.name,
            seed=seed,
            samples=len(indices),
            distinct=len(set(indices.tolist())),
            response_tokens=int(dataset.num_scored[indices].sum()),
            tokens=int(dataset.lengths[indices].sum()),
            steps=steps,
            teachers=counts,
            plan=hashlib.blake2b("".join(plan.fingerprint for plan in planned).encode(), digest_size=6).hexdigest(),
            rescored_tokens=rescored,
            answers=tuple(answers),
            seconds={name: round(value, 1) for name, value in spent.items()},
            solved=solves,
        )

    def split(self, seed: int) -> tuple[Any, Any]:
        return self.candidates.split(seed, held_out=self.held_out, train=self.train_prompts)

    def _pool(self, scores: Mapping[str, FloatArray]) -> Pool:
        dataset = self.candidates.dataset
        names = {name for arm in (*self.arms.values(), self.subject) for name in arm.uses_columns}
        return Pool(
            epoch=0,
            metrics=self.metrics,
            scores=scores,
            columns={name: dataset.column(name) for name in sorted({*names, "prompt_id", "teacher"})},
            lengths=dataset.lengths,
            content_hash=dataset.content_hash,
        )

    def chooser(self, seed: int, scores: Mapping[str, FloatArray]) -> Chooser:
        if "random" in self.metrics:  # anew for each seed
            metric = replace(self.metrics["random"], seed=seed) if isinstance(self.metrics["random"], Random) else None
            if metric is not None:
                dataset = self.candidates.dataset
                numbers = [metric.reduce(sample, [])["random"] for sample in dataset.samples(range(len(dataset)))]
                scores = {**scores, "random": np.array(numbers, np.float32)}
        return Chooser(
            pool=self._pool(scores),
            candidates=self.split(seed)[0],
            tokens=self.candidates.dataset.num_scored,
            budget=self.budget,
            seed=seed,
            subject=self.subject,
        )

    # ---- Scores of the untrained student, which all seeds share ----

    def scores(self) -> dict[str, FloatArray]:
        """Every candidate's scores by the student before training, kept in the folder in parts."""
        dataset, prompts = self.candidates.dataset, self.candidates.dataset.column("prompt_id")
        parts = [np.flatnonzero(prompts.codes // _CHUNK == part) for part in range(-(-len(prompts.values) // _CHUNK))]
        model = None
        for wait in (False, True):  # for the parts that other processes are scoring
            for part, rows in enumerate(parts):
                if self._lacking(part):
                    with self._claimed(self.folder / "scores" / f"{part}.lock", wait=wait) as mine:
                        if mine and (lacking := self._lacking(part)):
                            model = model if model is not None else self.load()
                            self._score_part(model, lacking, part, rows)
        columns: dict[str, FloatArray] = {}
        for part, rows in enumerate(parts):
            for metric in self.metrics.values():
                with np.load(self._scores_path(metric, part)) as file:
                    for column in metric.columns:
                        numbers = columns.setdefault(column, np.full(len(dataset), np.nan, np.float32))
                        numbers[rows] = file[column]
        return columns

    def _lacking(self, part: int) -> list[Metric]:
        """The metrics that some prompts' candidates have not been scored by."""
        return [metric for metric in self.metrics.values() if not self._scores_path(metric, part).exists()]

    def _scores_path(self, metric: Metric, part: int) -> Path:
        configuration = hashlib.blake2b(described(metric).encode(), digest_size=4).hexdigest()
        return self.folder / "scores" / f"{metric.name}-{configuration}-{part}.npz"

    def _score_part(self, model: Any, lacking: Sequence[Metric], part: int, rows: Any) -> None:
        """Score some prompts' candidates by all metrics that lack them, in one pass."""
        columns, tokens, seconds = scores_of(model, self.candidates.dataset, lacking, rows, self.training)
        for metric in lacking if self.ranks.rank == 0 else ():
            buffer = io.BytesIO()
            np.savez(buffer, **{name: columns[name][rows] for name in metric.columns})
            write_atomically(self._scores_path(metric, part), buffer.getvalue())
        self.ranks.gather(0)
        if self.ranks.rank == 0:
            names = [metric.name for metric in lacking]
            line = {"metrics": names, "tokens": tokens, "seconds": round(seconds, 1), "candidates": len(rows)}
            with (self.folder / "scores" / "cost.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.say(f"scored {len(rows)} candidates ({tokens:,} tokens) in {seconds:.0f} s, once for all seeds")

    @contextmanager
    def _claimed(self, path: Path, *, wait: bool = False) -> Iterator[bool]:
        """Whether this process may make what a lock is for: no other one is making it. The lock ends with the process.

        Args:
            path: of the lock.
            wait: for the other process to end, instead of giving up.
        """
        if self.ranks.world_size > 1:
            yield True
            return
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError:
                yield False
                return
            yield True
            path.unlink(missing_ok=True)


def runs_in(folder: Path) -> list[Run]:
    """All runs of a folder, or of a file of runs, one on each line, by seed and then by name.

    Raises:
        ValueError: there is none.
    """
    if folder.is_file():
        texts: Sequence[str] = folder.read_text(encoding="utf-8").splitlines()[1:]
    else:
        texts = [path.read_text(encoding="utf-8") for path in sorted((folder / "runs").glob("*.json"))]
    if not texts:
        raise ValueError(f"{folder} holds no run of a comparison. Make some: distill-sampler compare DATA --model …")
    return sorted((Run.from_json(text) for text in texts), key=lambda run: (run.seed, run.arm))


def scoring_cost(folder: Path) -> tuple[int, float] | None:
    """Tokens and seconds that scoring all candidates once took; None: unknown."""
    path = folder / "scores" / "cost.jsonl"
    if not path.exists():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sum(line["tokens"] for line in lines), sum(line["seconds"] for line in lines)


def metrics_for(arms: Sequence[Arm], known: Mapping[str, Metric]) -> dict[str, Metric]:
    """The metrics that some arms read, by name.

    Raises:
        ValueError: one is not among the known ones.
    """
    names = dict.fromkeys(name for arm in arms for name in arm.uses_metrics)
    for name in names:
        if name not in known:
            raise ValueError(f"--metrics: {unknown_name('metric', name, known, 'that are known')}")
    return {name: known[name] for name in names}
