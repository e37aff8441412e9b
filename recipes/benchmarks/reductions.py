"""The reductions from logits to statistics that this device can run, against float64: `python
recipes/benchmarks/reductions.py`. An error beyond float32's rounding ends it.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

from distill_sampler.reading.head import LogitTransform, linear
from distill_sampler.reading.token_stats import Impl, token_stats


def check(device: torch.device) -> Table:
    """Every reduction that the device can run, against formulas in float64.

    The logits are multiples of 1/16, which any order of summing gives exactly, so there are many ties, and ranks and
    ties must be the very same.
    """
    vocab = 50_257
    torch.manual_seed(0)
    weight = (torch.randint(-3, 4, (vocab, 256), device=device) / 16).to(torch.bfloat16)
    states = torch.randint(-3, 4, (600, 256), device=device).to(torch.bfloat16)
    targets = torch.randint(vocab, (len(states),), device=device)
    logits = states.double() @ weight.double().T
    own = logits.gather(1, targets[:, None])
    log_p = logits.log_softmax(1)
    true = {
        "surprisal": -log_p.gather(1, targets[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(1),
        "rank": 1 + (logits > own).sum(1),
        "ties": (logits == own).sum(1) - 1,
    }
    title = "Largest errors against float64"
    table = Table("reduction", "surprisal, nats", "entropy, nats", "rank", "ties", title=title)
    impls: list[Impl] = ["chunked", "compiled"] + (["triton"] if device.type == "cuda" else [])
    for impl in impls:
        project = linear(weight, None, LogitTransform())
        found = token_stats(states, targets, project, extras=["entropy"], chunk=256, impl=impl)
        errors = {name: (found[name] - right).abs().max().item() for name, right in true.items()}
        assert max(errors.values()) < 1e-3, (impl, errors)
        table.add_row(impl, *(f"{error:.1e}" if error else "0" for error in errors.values()))
    return table


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    at = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    Console().print(check(at or torch.device("cpu")))


if __name__ == "__main__":
    main()
