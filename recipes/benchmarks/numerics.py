"""How low precision changes ranks, RSR and the choice per prompt.

    python recipes/benchmarks/numerics.py [--data FILE] [--prompts 12] [--max-length 1024]

The student's weights are rounded to bfloat16 once, so all rows of the table use the same weights and only the
arithmetic differs. The reference is float32 throughout. Two bodies (float32 and bfloat16) are combined with three ways
to compute logits: a float32 product, the same with bfloat16 inputs, and logits rounded to bfloat16, as a plain call of
a bfloat16 model returns them. Rounded logits tie, so the tie rule matters: strict `>` (the authors'), half of the ties
(mid), or `>=` (vLLM's rank). Only for students whose logits are the plain product with the head (Llama, Qwen, ...).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scoring import add_student_and_traces, load
from torch import Tensor

from distill_sampler.reading.head import LogitTransform, Project, linear, module
from distill_sampler.reading.token_stats import chunk_for, token_stats

CLIP = 100
RULES = {"strict": 0.0, "mid": 0.5, ">=": 1.0}
"""Share of the ties that counts in a rank."""

Tokens = dict[str, np.ndarray[Any, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_student_and_traces(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.dtype = "bfloat16"
    low, dataset, prompts = load(options)
    options.dtype = "float32"
    exact, _, _ = load(options)
    exact.load_state_dict(low.state_dict())  # the rounded weights, in float32

    weights = {model.dtype: model.get_output_embeddings().weight for model in (exact, low)}
    float32 = linear(weights[torch.float32], None, LogitTransform())
    ways: dict[str, tuple[Any, Project, torch.dtype]] = {
        "float32": (exact, float32, torch.float32),
        "float32 body, product of bfloat16 inputs": (exact, float32, torch.bfloat16),
        "float32 body, bfloat16 logits": (exact, rounded(weights[torch.bfloat16]), torch.bfloat16),
        "bfloat16 body, float32 product": (low, float32, torch.float32),
        "bfloat16 body, bfloat16 logits": (low, rounded(weights[torch.bfloat16]), torch.bfloat16),
    }
    found: dict[str, list[Tokens]] = {name: [] for name in ways}
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        tokens, places = torch.from_numpy(sample.input_ids), torch.from_numpy(np.flatnonzero(sample.scored))
        with torch.no_grad():
            states = {
                model.dtype: model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0, places - 1]
                for model in (exact, low)
            }
            for name, (model, project, inputs) in ways.items():
                hidden = states[model.dtype].to(inputs).to(torch.float32 if project is float32 else inputs)
                stats = token_stats(hidden, tokens[places], project, chunk=chunk_for(len(weights[torch.float32])))
                found[name].append({column: values.numpy() for column, values in stats.items()})

    truth = found["float32"]
    print("| against float32 | ranks changed | tied | RSR bias | mean error | Spearman | same best of a prompt |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, stats in found.items():
        for rule in RULES if "logits" in name else ["strict"]:
            cells = compare(stats, truth, rule, prompts)
            label = f"{name}, ties {rule}" if "logits" in name else name
            print(f"| {label} | " + " | ".join(cells.values()) + " |")


def rounded(weight: Tensor) -> Project:
    """Logits as a plain call of the head returns them, in its own dtype."""
    return module(lambda hidden: hidden @ weight.T, LogitTransform())


def rsr(tokens: Tokens, rule: str) -> float:
    ranks = tokens["rank"] + RULES[rule] * tokens["ties"]
    return float(ranks.clip(max=CLIP).sum() / tokens["surprisal"].sum(dtype=np.float64))


def compare(stats: list[Tokens], truth: list[Tokens], rule: str, prompts: list[str]) -> Mapping[str, str]:
    ours = np.array([rsr(tokens, rule) for tokens in stats])
    theirs = np.array([rsr(tokens, "strict") for tokens in truth])
    relative = ours / theirs - 1
    groups: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(place)
    several = [np.array(group) for group in groups.values() if len(group) > 1]
    same = [ours[group].argmin() == theirs[group].argmin() for group in several]
    ranks, ties = (np.concatenate([tokens[name] for tokens in stats]) for name in ("rank", "ties"))
    changed = (ranks + RULES[rule] * ties).clip(max=CLIP) != np.concatenate([t["rank"] for t in truth]).clip(max=CLIP)
    orders = [np.argsort(np.argsort(values)) for values in (ours, theirs)]
    return {
        "changed": f"{changed.mean():.1%}",
        "tied": f"{(ties > 0).mean():.1%}",
        "bias": f"{relative.mean():+.2%}",
        "error": f"{np.abs(relative).mean():.2%}",
        "spearman": f"{np.corrcoef(*orders)[0, 1]:.4f}",
        "same": f"{np.mean(same):.0%}",
    }


if __name__ == "__main__":
    main()
