"""`distill-sampler demo`: trains on real data through the same `attach` that users call."""

from __future__ import annotations

import logging
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from peft import LoraConfig
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from distill_sampler import BestOf, Curriculum, GlobalNaturalness, RankSurprisalRatio, Shuffle, attach
from distill_sampler.cli.demo_parts import candidates, fastest_dtype, student_folder
from distill_sampler.planning.summary import PREFIX
from distill_sampler.report.page import write_report

RSR = "rank_surprisal_ratio"


def run(*, prompts: int, max_length: int, epochs: int, output: Path, full: bool, seed: int) -> None:
    """Run the demo, and write its results to the folder `output`.

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
    say.print("[bold]1/5[/] Student: SmolLM2-135M-Instruct (converted once, takes half a minute the first time)")
    folder = student_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    rows = candidates(tokenizer, prompts=prompts, max_length=max_length)
    found = len(rows) // 4
    say.print(f"[bold]2/5[/] Candidates: {len(rows)} traces, {found} competition problems x 4 teachers (CHAMP)")
    if found < prompts:
        say.print(f"      only {found} problems have traces of up to {max_length} tokens; raise --max-length for more")

    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows,
        peft_config=None if full else LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        args=SFTConfig(
            output_dir=str(output),
            num_train_epochs=epochs,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            learning_rate=2e-5 if full else 2e-4,
            max_length=max_length,
            bf16=False,  # no autocast: the weights are already in the fastest dtype of this machine
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=False,
            dataloader_pin_memory=False,
            seed=seed,
        ),
    )
    curriculum = Curriculum(
        metrics=[RankSurprisalRatio(), GlobalNaturalness()],
        policies=[BestOf(RSR, per="prompt_id"), Shuffle()],
        seed=seed,
    )
    attach(trainer, curriculum)

    kind, precision = "all weights" if full else "a LoRA", str(dtype).removeprefix("torch.")
    say.print(f"[bold]3/5[/] Training {kind} for {epochs} epochs in {precision}; scoring before each")
    trainer.train()

    say.print("\n[bold]4/5[/] Scoring the traces again with the trained student")
    curriculum.score(trainer.model_wrapped, epoch=epochs, step=trainer.state.global_step)

    say.print(f"[bold]5/5[/] Writing {output}/")
    _write(trainer, curriculum, output)
    _show(say, curriculum, rows)
    _figures(say, trainer, curriculum, time.perf_counter() - started)


def _write(trainer: SFTTrainer, curriculum: Curriculum, output: Path) -> None:
    trainer.save_model(str(output / "model"))
    curriculum.save_run(output)
    write_report(output, output / "scores.html", title="SmolLM2-135M-Instruct reads four teachers")


def _show(say: Console, curriculum: Curriculum, rows: Any) -> None:
    """Show the best and the worst trace of the problem with the largest difference in the first epoch's scores."""
    first = curriculum.cycle.record.passes[0].columns
    prompt_ids = rows["prompt_id"]
    groups: dict[str, list[int]] = {}
    for index, prompt_id in enumerate(prompt_ids):
        groups.setdefault(prompt_id, []).append(index)

    def gap(group: list[int]) -> float:
        scores = [float(first[RSR][index]) for index in group]
        return max(scores) - min(scores)

    group = max(groups.values(), key=gap)
    order = sorted(group, key=lambda index: float(first[RSR][index]))
    problem = rows[group[0]]["prompt"][1]["content"].split("\n\n", 1)[-1]
    say.print(Panel(Text(textwrap.shorten(problem, 400)), title="the problem where the choice mattered most"))
    for index, verdict in ((order[0], "chosen: lowest RSR of the four"), (order[-1], "last of the four")):
        numbers = (
            f"RSR {first[RSR][index]:.2f} = mean clipped rank {first['mean_rank'][index]:.2f} / "
            f"mean surprisal {first['mean_surprisal'][index]:.2f} nats, {curriculum.dataset.num_scored[index]} tokens"
        )
        excerpt = textwrap.shorten(rows[index]["completion"][0]["content"], 420)
        say.print(Panel(Text(excerpt), title=f"{rows[index]['teacher']}, {verdict}", subtitle=numbers))
    say.print(
        "A low ratio means that the student did not expect the tokens (high surprisal: there is something to learn), "
        "but ranked them near the top (low rank: they are within reach).\n"
    )


def _figures(say: Console, trainer: SFTTrainer, curriculum: Curriculum, seconds: float) -> None:
    name = f"{PREFIX}scoring_share"
    shares = [line[name] for line in trainer.state.log_history if name in line]
    tokens = sum(summary.scoring.tokens for summary in curriculum.summaries)
    scoring = sum(summary.scoring.seconds for summary in curriculum.summaries)
    say.print(f"wall time            {seconds:.0f} s")
    say.print(f"scoring throughput   {tokens / scoring:,.0f} tokens/s")
    say.print(f"scoring share        {', '.join(f'{share:.0%}' for share in shares)} of each epoch's time")
    say.print(
        "\n[bold]scores.html[/] has pictures of the scores before and after training, [bold]scores.parquet[/] and "
        "[bold]plans.parquet[/] have the numbers, and [bold]model/[/] is the student."
    )
