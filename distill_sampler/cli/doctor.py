"""`distill-sampler doctor`: shows what is installed, and how close scoring comes to the speed of a bare forward."""

from __future__ import annotations

import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from distill_sampler import GlobalNaturalness, RankSurprisalRatio, ScoredDataset, Scorer
from distill_sampler.integrations.loading import load_model, locate, pick_device, pick_dtype
from distill_sampler.plugins import Plugin, plugins
from distill_sampler.protocols import Metric
from distill_sampler.reading.structure import unwrap
from distill_sampler.reading.token_stats import fastest, usual_batch_tokens

PACKAGES = ("distill_sampler", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "deepspeed", "triton")
LENGTH = 512


def run(
    *, model: str | None, device: str, dtype: str, seconds: float, trust_remote_code: bool, say: Console
) -> dict[str, Any]:
    """Print versions, hardware, plug-ins and a throughput test. Returns them as data.

    Raises:
        ValueError: there is no such device or model.
    """
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    place = pick_device(device)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in PACKAGES:
        table.add_row(name, _installed(name) or "[dim]not installed[/]")
    for label, value in _machine(place):
        table.add_row(label, value)
    for plugin in plugins():
        table.add_row(f"{plugin.kind} {plugin.name}", _whose(plugin))
    say.print(table)
    student, what = _student(model, place, dtype, trust_remote_code)
    say.print(f"\nThroughput test: {what}, sequences of {LENGTH} tokens, about {seconds:.0f} s", highlight=False)
    kernel = fastest(place, 2048 * student.config.get_text_config().vocab_size)
    say.print(f"  statistics of a token: '{kernel}'")
    bare, scored = _throughput(student, place, seconds)
    say.print(f"  bare backbone forward   {bare:>12,.0f} tokens/s   (the limit)")
    say.print(f"  scoring, two metrics    {scored:>12,.0f} tokens/s   ({bare / scored:.2f} x the limit's time)")
    if scored > bare:
        say.print(
            "  [yellow]Scoring seems faster than its limit, so the machine is busy. Measure longer with --seconds.[/]"
        )
    if scored < bare / 1.5:
        say.print(
            "  [yellow]Scoring is far from the limit. The output head may be a large part of this model, or the "
            "machine is busy.[/]"
        )
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _installed(name))},
        "machine": dict(_machine(place)),
        "plugins": [{"kind": each.kind, "name": each.name, "package": each.package} for each in plugins()],
        "student": what,
        "kernel": kernel,
        "bare_tokens_per_second": bare,
        "scoring_tokens_per_second": scored,
    }


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _whose(plugin: Plugin) -> Text:
    """The package and import path of a metric, policy or reader; or why it cannot be used."""
    try:
        plugin.load()
    except ValueError as error:
        return Text(str(error), style="yellow")
    return Text(f"from {plugin.package}: {plugin.path}")


def _machine(device: torch.device) -> list[tuple[str, str]]:
    found = [("device", str(device)), ("threads", str(torch.get_num_threads()))]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found.append(("accelerator", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
        found.append(("bfloat16", "yes" if torch.cuda.is_bf16_supported(False) else "emulated"))
    else:
        found.append(("accelerators", str(torch.cuda.device_count())))
        found.append(("cpu capability", torch.backends.cpu.get_cpu_capability()))
    return found


def _student(model: str | None, device: torch.device, dtype: str, trust_remote_code: bool) -> tuple[Any, str]:
    """The user's model, or a random one of the size of SmolLM2-135M: throughput does not depend on the weights."""
    dtype = pick_dtype(dtype, device)
    if model is not None:
        locate(model)
        loaded = load_model(model, revision=None, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        return loaded, f"{Path(model).name} in {dtype}"
    shape = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    student: Any = LlamaForCausalLM(shape)
    student = student.to(device, getattr(torch, dtype)).eval()
    return student, f"a random Llama of 135 million weights in {dtype}"


def _throughput(student: Any, device: torch.device, seconds: float) -> tuple[float, float]:
    """Tokens a second of the bare backbone and of scoring, measured in turns under the same conditions."""
    budget = usual_batch_tokens(device)
    vocabulary = student.config.get_text_config().vocab_size
    input_ids = np.random.default_rng(0).integers(0, vocabulary, (budget // LENGTH, LENGTH))
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in input_ids]
    dataset = ScoredDataset(rows)
    metrics: list[Metric] = [RankSurprisalRatio(), GlobalNaturalness()]
    scorer = Scorer(batch_tokens=budget, progress=False)
    backbone = unwrap(student).base_model
    tokens = torch.from_numpy(input_ids).to(device)

    def bare() -> None:
        with torch.no_grad():
            backbone(input_ids=tokens, use_cache=False)

    def scoring() -> None:
        for _ in scorer.score(student, dataset, metrics, np.arange(len(dataset))):
            pass

    times: dict[Any, list[float]] = {bare: [], scoring: []}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times[scoring]) < 2:
        for work, spent in times.items():
            begun = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent.append(time.perf_counter() - begun)
    return input_ids.size / min(times[bare]), input_ids.size / min(times[scoring])
