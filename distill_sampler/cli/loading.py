"""Loading the student for a command: the model, its tokenizer, a LoRA on top; refusals in one sentence."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_sampler.reading.forward import reading

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Student:
    """A model that is ready to be read with."""

    model: Any
    tokenizer: Any
    dtype: str
    revision: str | None
    """The commit of a model from the hub; None for a folder."""


def pick_device(name: str) -> torch.device:
    """`auto` is the first accelerator there is; under a launcher each process takes its own.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}); 'cpu' always can.") from None


def load_student(
    name: str, *, revision: str | None, dtype: str, device: torch.device, lora: Path | None, chat_template: Path | None
) -> Student:
    """Load a causal language model and its tokenizer.

    Raises:
        ValueError: it is not there, is not a causal language model, or the adapter does not fit.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}.")
    if dtype == "auto":
        # on a CPU float32 costs little more and gives ranks without bfloat16's ties
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
    folder = Path(name)
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"There is no model folder {name}; check the path.")
    if folder.is_dir() and not (folder / "config.json").exists():
        hint = ""
        if (folder / "adapter_config.json").exists():
            hint = " It is an adapter: give the base model with --model, and this folder with --lora."
        raise ValueError(f"The folder {name} holds no model (no config.json).{hint}")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=getattr(torch, dtype))
        tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".:")
        if "Unrecognized configuration class" in str(error):
            raise ValueError(
                f"{name} is not a causal language model ({reason.split('class ')[-1].split(' ')[0]}), so it gives no "
                "probability to a response token by token. Give a decoder such as Llama, Qwen or SmolLM."
            ) from None
        raise ValueError(
            f"The model {name} cannot be loaded: {reason}. Give a folder with config.json, weights and tokenizer, or a "
            "name on the hub that this machine can reach."
        ) from None
    if lora is not None:
        model = _with_lora(model, lora)
    if chat_template is not None:
        if not chat_template.is_file():
            raise ValueError(f"--chat-template {chat_template}: there is no such file.")
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    model = model.to(device).eval()
    with reading(model):  # refuses what is not causal
        pass
    return Student(
        model=model, tokenizer=tokenizer, dtype=dtype, revision=getattr(model.config, "_commit_hash", None) or revision
    )


def _with_lora(model: Any, lora: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError("--lora needs peft: pip install peft.") from None
    try:
        return PeftModel.from_pretrained(model, str(lora))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"--lora {lora} does not fit the model: {str(error).strip().splitlines()[0]}") from None
