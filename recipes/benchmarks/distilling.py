"""What soft targets cost: the loss alone in memory and time, and a training step with a live teacher.

    python recipes/benchmarks/distilling.py loss [--positions 8192] [--vocab 151936] [--hidden 896] [--dtype bfloat16]
    python recipes/benchmarks/distilling.py step [--rounds 8] [--length 256] [--batch-size 2] [--vocab 49152]

`loss` runs the forward and backward pass of the divergence from hidden states on, each way in a process of its own, and
prints its peak memory beyond weights, states and gradients, its time, its value, and the norms of its gradients. The
ways: this library's; the plain formula, which holds all logits; and TRL's `GKDTrainer.generalized_jsd_loss` on the
logits, as its distillation trainer calls it. The last two get `--few` positions, an eighth by default, and so does this
library once more, for the same numbers. In float32, all values are the same; in bfloat16, TRL rounds at each step.

`step` times a forward and backward pass of random Llamas with `SoftTargets`, and with the same loss by TRL's function
(`--no-trl`: without), interleaved with the student's own forward and backward pass and the teacher's forward pass. Then
it runs each way once in a process of its own for its peak memory beyond models and gradients.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from distill_sampler import ScoredDataset
from distill_sampler.objectives.divergence import Cells, Head, blocks, soft_target_loss
from distill_sampler.objectives.live import Setting
from distill_sampler.objectives.soft_targets import SoftTargets
from distill_sampler.reading.head import LogitTransform, linear

TEMPERATURE = 2.0
BETAS = {"forward": 0.0, "js": 0.5, "reverse": 1.0}
"""The divergences in TRL's words."""
console = Console(width=120)


def peak_megabytes(*, from_now: bool = False) -> float:
    """The process's peak memory so far, or where Linux allows it, since the last call with `from_now`."""
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    if from_now:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii"))[0]) * 1024 / 1e6


def trls_loss() -> Callable[..., torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        from trl.experimental.gkd import GKDTrainer

    loss: Callable[..., torch.Tensor] = GKDTrainer.generalized_jsd_loss
    return loss


def in_own_process(*command: str) -> dict[str, Any]:
    """What a command of this script prints. Memory is a high-water mark, so each way needs a process."""
    done = subprocess.run([sys.executable, __file__, *command], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---- The loss alone ----


def loss_work(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    dtype, rows = getattr(torch, options.dtype), options.positions
    weights = [torch.randn(options.vocab, options.hidden).mul_(0.05).to(dtype) for _ in range(2)]
    states = [torch.randn(rows, options.hidden).to(dtype) for _ in range(2)]
    weights[0].requires_grad_(), states[0].requires_grad_()
    theirs = trls_loss() if options.way == "TRL" else None

    def logits(rows: int) -> list[torch.Tensor]:
        with torch.no_grad():
            teacher = states[1][:rows] @ weights[1].T
        return [states[0][:rows] @ weights[0].T, teacher]

    def loss(rows: int) -> torch.Tensor:
        if theirs is not None:
            value = theirs(*logits(rows), beta=BETAS[options.divergence], temperature=TEMPERATURE)
            return TEMPERATURE**2 * value
        if options.way == "plain":
            log_q, log_p = (torch.log_softmax(each.float() / TEMPERATURE, -1) for each in logits(rows))
            p, q = log_p.exp(), log_q.exp()
            log_m = ((p + q) / 2).log() if options.divergence == "js" else None
            each = {
                "forward": lambda: p * (log_p - log_q),
                "reverse": lambda: q * (log_q - log_p),
                "js": lambda: (p * (log_p - log_m) + q * (log_q - log_m)) / 2,
            }[options.divergence]()
            return TEMPERATURE**2 * each.sum(-1).mean()
        project = linear(weights[1], None, LogitTransform(), rounded=True)

        @torch.no_grad()
        def targets(start: int, stop: int) -> Cells:  # as a live teacher's
            logits = project(states[1][start:stop]).div_(TEMPERATURE)
            for block in blocks(*logits.shape):
                logits[block] -= logits[block].logsumexp(1, keepdim=True)
            return Cells(log_probs=logits)

        coefficients = torch.full((rows,), 1 / rows)
        return soft_target_loss(
            states[0][:rows],
            Head(weight=weights[0]),
            targets,
            coefficients,
            temperature=TEMPERATURE,
            divergence=options.divergence,
        )

    loss(8).backward()  # libraries, and the gradients that training holds anyway
    for each in (weights[0], states[0]):
        assert each.grad is not None
        each.grad.zero_()
    before = peak_megabytes(from_now=True)
    started = time.perf_counter()
    value = loss(rows)
    value.backward()
    seconds = time.perf_counter() - started
    found = {"MB": peak_megabytes() - before, "seconds": seconds, "loss": value.item()}
    for name, each in (("states", states[0]), ("head", weights[0])):
        assert each.grad is not None
        found[f"gradient of {name}"] = each.grad.float().norm().item()
    print(json.dumps(found))


def loss(options: argparse.Namespace) -> None:
    few = options.few or options.positions // 8
    names = ("way", "positions", "MB beyond weights and gradients", "µs a position", "loss")
    table = Table(*names, "gradient of states", "of head", title=f"{options.divergence} divergence, {options.dtype}")
    for way, positions in (("ours", options.positions), ("ours", few), ("plain", few), ("TRL", few)):
        shared = [f"--{name}={getattr(options, name)}" for name in ("vocab", "hidden", "dtype", "divergence")]
        found = in_own_process("loss-work", f"--way={way}", f"--positions={positions}", *shared)
        table.add_row(
            way,
            f"{positions:,}",
            f"{found['MB']:,.0f}",
            f"{1e6 * found['seconds'] / positions:,.0f}",
            *(f"{found[name]:.6g}" for name in ("loss", "gradient of states", "gradient of head")),
        )
    console.print(table)


# ---- A step of training ----


def llama(layers: int, hidden: int, vocab: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        )
    )


Ways = dict[str, Callable[[], torch.Tensor | None]]


def ways_of(options: argparse.Namespace, opened: ExitStack) -> tuple[Ways, dict[str, Any]]:
    """What a step may do with student and teacher (those with a loss return it), and the batch that it reads."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    student, teacher = (
        llama(layers, hidden, options.vocab).to(dtype)
        for layers, hidden in (map(int, size.split("x")) for size in (options.student, options.teacher))
    )
    teacher.eval().requires_grad_(False)
    ids = torch.randint(0, options.vocab, (options.batch_size, options.length))
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids}
    rows = ScoredDataset([{"input_ids": [1, 2], "labels": [1, 2]}])
    tap = SoftTargets(teacher, temperature=TEMPERATURE, divergence=options.divergence).tap(Setting(rows))
    theirs = trls_loss() if options.trl else None

    def of_student() -> None:
        student.zero_grad(set_to_none=False)
        student(**inputs, use_cache=False).loss.backward()

    @torch.no_grad()
    def of_teacher() -> None:
        teacher(input_ids=inputs["input_ids"], use_cache=False)

    @torch.no_grad()
    def of_teachers_body() -> None:
        teacher.get_decoder()(input_ids=inputs["input_ids"], use_cache=False)

    def ours() -> torch.Tensor:
        student.zero_grad(set_to_none=False)
        tap.expect(inputs, progress=0.0)
        own = student(**inputs, use_cache=False).loss
        loss = tap.added_to(own, scale=1 / inputs["labels"][:, 1:].numel())
        loss.backward()
        tap.teacher.forget()  # type: ignore[attr-defined]
        return loss.detach()

    def trls() -> torch.Tensor:
        assert theirs is not None
        student.zero_grad(set_to_none=False)
        output = student(**inputs, use_cache=False)
        with torch.no_grad():
            logits = teacher(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1]
        value = theirs(
            output.logits[:, :-1],
            logits,
            labels=inputs["labels"][:, 1:],
            beta=BETAS[options.divergence],
            temperature=TEMPERATURE,
        )
        loss = 0.5 * TEMPERATURE**2 * value + 0.5 * output.loss
        loss.backward()
        return loss.detach()

    opened.enter_context(tap.open(student, step=0))
    ways: Ways = {
        "student": of_student,
        "teacher": of_teacher,
        "teacher's body": of_teachers_body,
        "ours": ours,
    }
    return ways | ({} if theirs is None else {"TRL": trls}), inputs


def step_work(options: argparse.Namespace) -> None:
    """The peak memory of one way, and its loss."""
    with ExitStack() as opened:
        ways, inputs = ways_of(options, opened)
        whole = dict(inputs)
        inputs.update({name: values[:1, :8] for name, values in whole.items()})
        ways[options.way]()  # libraries, gradients
        inputs.update(whole)
        before = peak_megabytes(from_now=True)
        value = ways[options.way]()
        print(json.dumps({"MB": peak_megabytes() - before, "loss": None if value is None else value.item()}))


def step(options: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {}
    with ExitStack() as opened:
        ways, _ = ways_of(options, opened)
        for number in range(options.rounds + 1):
            for name in list(ways) if number % 2 else list(ways)[::-1]:
                started = time.perf_counter()
                ways[name]()
                if number:  # the first round warms up
                    seconds.setdefault(name, []).append(time.perf_counter() - started)
        whole = [sum(pair) for pair in zip(seconds["student"], seconds["teacher"], strict=True)]
        body = [sum(pair) for pair in zip(seconds["student"], seconds["teacher's body"], strict=True)]
        table = Table("way", "/ (student + teacher)", "/ (student + teacher's body)", "peak MB", "loss")
        for name in ("student", *list(ways)[3:]):
            row = [_ratio(seconds[name], base) for base in (whole, body)]
            sent = {name: value for name, value in vars(options).items() if name not in ("run", "rounds", "trl", "way")}
            command = [f"--{name.replace('_', '-')}={value}" for name, value in sent.items()]
            found = in_own_process("step-work", f"--way={name}", *command, *([] if name == "TRL" else ["--no-trl"]))
            table.add_row(name, *row, f"{found['MB']:,.0f}", "" if found["loss"] is None else f"{found['loss']:.6g}")
    console.print(
        f"{options.rounds} rounds of {options.batch_size} x {options.length} tokens, {options.vocab:,} columns: "
        "student = its forward and backward pass, teacher = its forward pass; medians (quartiles)"
    )
    console.print(table)


def _ratio(of: list[float], to: list[float]) -> str:
    ratios = [one / base for one, base in zip(of, to, strict=True)]
    if len(ratios) < 2:
        return f"{ratios[0]:.3f}"
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="loss|step")
    for name, function in (("loss", loss), ("loss-work", loss_work)):
        command = commands.add_parser(name)
        command.add_argument("--positions", type=int, default=8192)
        command.add_argument("--few", type=int, help="positions for the ways that hold all logits")
        command.add_argument("--vocab", type=int, default=151936)
        command.add_argument("--hidden", type=int, default=896)
        command.add_argument("--dtype", default="bfloat16")
        command.add_argument("--divergence", choices=list(BETAS), default="forward")
        command.add_argument("--way", default="ours")
        command.set_defaults(run=function)
    for name, function in (("step", step), ("step-work", step_work)):
        command = commands.add_parser(name)
        command.add_argument("--rounds", type=int, default=8)
        command.add_argument("--length", type=int, default=256)
        command.add_argument("--batch-size", type=int, default=2)
        command.add_argument("--vocab", type=int, default=49152)
        command.add_argument("--student", default="12x512", help="layers x hidden size")
        command.add_argument("--teacher", default="16x768", help="layers x hidden size")
        command.add_argument("--dtype", default="float32")
        command.add_argument("--divergence", choices=list(BETAS), default="forward")
        command.add_argument("--no-trl", dest="trl", action="store_false", help="leave out TRL's loss")
        command.add_argument("--way", default="ours")
        command.set_defaults(run=function)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
