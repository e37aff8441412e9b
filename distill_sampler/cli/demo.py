"""`distill-sampler demo`: trains on real data through the same `attach` that users call."""

from __future__ import annotations

import logging
import math
import time
import warnings
import webbrowser
from pathlib import Path

from datasets import disable_progress_bars
from peft import LoraConfig
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from distill_sampler import BestOf, Curriculum, GlobalNaturalness, MatchTeachers, RankSurprisalRatio, Shuffle, attach
from distill_sampler.cli import demo_truth as truth
from distill_sampler.cli.demo_parts import candidates, fastest_dtype, student_folder
from distill_sampler.planning.summary import PREFIX
from distill_sampler.report.page import write_report

METRICS = [RankSurprisalRatio(), GlobalNaturalness()]
BEST = BestOf("rank_surprisal_ratio", per="prompt_id")
CONTROL = MatchTeachers(of=BEST, teacher="teacher", per="prompt_id")
HELD_OUT = 2
"""So many problems are held out."""


def run(
    *, prompts: int, max_length: int, epochs: int, output: Path, full: bool, control: bool, show: bool, seed: int
) -> None:
    """Run the demo, and write its results to the folder `output`.

    Args:
        prompts: number of problems to train on.
        max_length: tokens of the longest prompt with its trace.
        epochs: number of epochs.
        output: the folder.
        full: train all weights instead of a LoRA.
        control: train a second student on random traces with the same mixture of teachers.
        show: open the report in the browser at the end.
        seed: seed of plans and training.

    Raises:
        ValueError: a package of the demo is not installed, or no problem fits into `max_length`.
    """
    started = time.perf_counter()
    say = Console(stderr=True)
    transformers_logging.set_verbosity(logging.ERROR)
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # dependencies raise these about one another
    output.mkdir(parents=True, exist_ok=True)

    dtype = fastest_dtype()
    say.print("[bold]1/4[/] Student: SmolLM2-135M-Instruct (converted once, takes half a minute the first time)")
    folder = student_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    rows = candidates(tokenizer, prompts=prompts + HELD_OUT, max_length=max_length, contested=True)
    found = max(len(rows) // 4 - HELD_OUT, 1)
    train, rest = rows.select(range(4 * found)), rows.select(range(4 * found, len(rows)))
    held_out = rest.filter(lambda row: row["correct"])
    say.print(
        f"[bold]2/4[/] Candidates: {len(train)} traces, {found} competition problems x 4 teachers (CHAMP). Some of the "
        f"traces of each problem are right, some are wrong. Held out: {len(held_out)} right traces of {len(rest) // 4} "
        "other problems"
    )
    if found < prompts:
        say.print(f"      only {found} problems have traces of up to {max_length} tokens; raise --max-length for more")

    def trainer_of(folder_of_run: Path) -> SFTTrainer:
        made = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
            processing_class=tokenizer,
            train_dataset=train,
            eval_dataset=held_out if len(held_out) else None,
            peft_config=None if full else LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            args=SFTConfig(
                output_dir=str(folder_of_run),
                num_train_epochs=epochs,
                per_device_train_batch_size=1,
                per_device_eval_batch_size=1,
                learning_rate=2e-5 if full else 2e-4,
                max_length=max_length,
                bf16=False,  # no autocast: the weights are already in the fastest dtype of this machine
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                seed=seed,
            ),
        )
        made.remove_callback(PrinterCallback)  # the curriculum's tables say more than the log
        return made

    trainer = trainer_of(output)
    curriculum = Curriculum(metrics=METRICS, policies=[BEST, Shuffle()], seed=seed)
    attach(trainer, curriculum)
    kind, precision = "all weights" if full else "a LoRA", str(dtype).removeprefix("torch.")
    say.print(f"[bold]3/4[/] Training {kind} for {epochs} epochs in {precision}; scoring before each")
    before = held_out_loss(trainer)
    trainer.train()
    losses = {"before training": before, "after training on the chosen traces": held_out_loss(trainer)}
    if control:
        say.print("      The control: another student, on random traces with the same mixture of teachers")
        other = trainer_of(output / "control")
        attach(other, Curriculum(metrics=METRICS, policies=[CONTROL, Shuffle()], seed=seed))
        other.train()
        losses["after training on the control's traces"] = held_out_loss(other)

    say.print(f"\n[bold]4/4[/] Writing {output}/\n")
    trainer.save_model(str(output / "model"))
    curriculum.save_run(output)
    page = write_report(output, output / "scores.html", title="SmolLM2-135M-Instruct reads four teachers").resolve()
    truth.show(say, curriculum.cycle.scores(), train, best=BEST, control=CONTROL)
    truth.show_losses(say, losses)
    _figures(say, trainer, curriculum, time.perf_counter() - started)
    say.print(f"[bold]The report:[/] {page.as_uri()}", soft_wrap=True)
    if show:
        webbrowser.open(page.as_uri())


def held_out_loss(trainer: SFTTrainer) -> float:
    """Mean negative log-probability of the held-out responses, in nats a token; NaN if there are none."""
    if trainer.eval_dataset is None:
        return math.nan
    return float(trainer.evaluate()["eval_loss"])


def _figures(say: Console, trainer: SFTTrainer, curriculum: Curriculum, seconds: float) -> None:
    name = f"{PREFIX}scoring_share"
    shares = [line[name] for line in trainer.state.log_history if name in line]
    tokens = sum(summary.scoring.tokens for summary in curriculum.summaries)
    scoring = sum(summary.scoring.seconds for summary in curriculum.summaries)
    shown = ", ".join(f"{share:.0%}" for share in shares)
    say.print(
        f"wall time {seconds:.0f} s, scoring {tokens / scoring:,.0f} tokens/s, {shown} of the epochs' time. "
        "[bold]scores.parquet[/] and [bold]plans.parquet[/] have the numbers, [bold]model/[/] is the student."
    )
