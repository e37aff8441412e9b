"""The reductions from logits to statistics that this device can run, against float64: `python
recipes/benchmarks/kernels.py`. An error beyond float32's rounding ends it.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

from distill_sampler.reading.head import LogitTransform, linear
from distill_sampler.reading.token_stats import Impl, token_stats


def check(device: torch.device) -> Table:
    """Every reduction that the device can run, against formulas in float64. Some targets are tied with one column."""
    vocab = 50_257
    torch.manual_seed(0)
    weight = torch.randn(vocab, 256, device=device).to(torch.bfloat16)
    weight[5000:10_000] = weight[:5000]
    states = torch.randn(600, 256, device=device).to(torch.bfloat16)
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
    table = Table("reduction", "surprisal", "entropy", "ranks that differ", "ties that differ")
    table.title = "Against float64: largest errors in nats"
    impls: list[Impl] = ["chunked", "compiled"] + (["triton"] if device.type == "cuda" else [])
    for impl in impls:
        project = linear(weight, None, LogitTransform())
        found = token_stats(states, targets, project, extras=["entropy"], chunk=256, impl=impl)
        errors = {name: (found[name] - true[name]).abs().max().item() for name in ("surprisal", "entropy")}
        # float32 sums in another order may swap two columns that are all but equal
        differ = [(found[name] != true[name]).float().mean().item() for name in ("rank", "ties")]
        table.add_row(impl, *(f"{error:.1e}" for error in errors.values()), *(f"{share:.2%}" for share in differ))
        assert max(errors.values()) < 1e-3, (impl, errors)
        assert max(differ) < 0.02, (impl, differ)
    return table


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    at = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    Console().print(check(at or torch.device("cpu")))


if __name__ == "__main__":
    main()
