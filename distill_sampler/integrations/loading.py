"""Loads the student for a command: the model, its tokenizer, and a LoRA on top. What cannot be loaded is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import cached_file

from distill_sampler.content import content_hashes
from distill_sampler.reading.forward import reading

DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_device(name: str) -> torch.device:
    """The named device. `auto` is an accelerator (under a launcher, the process's own) if there is one, else the CPU.

    Raises:
        ValueError: this machine has no such device.
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
        raise ValueError(f"--device {name} cannot be used on this machine ({reason}). Use cpu.") from None


def locate(name: str, *, revision: str | None = None, file: str = "config.json") -> tuple[Path, str | None]:
    """The folder of a model's files, and the model's commit if it comes from the hub.

    Args:
        name: a folder, or the name of a model on the hub.
        revision: the revision of a model on the hub.
        file: a file that the model must have.

    Raises:
        ValueError: there is no such model.
    """
    folder = Path(name)
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"There is no model folder {name}. Check the path.")
    if folder.is_dir():
        if not (folder / file).exists():
            hint = ""
            if (folder / "adapter_config.json").exists():
                hint = " It is an adapter: give the base model with --model, and this folder with --lora."
            raise ValueError(f"The folder {name} holds no model: it has no {file}.{hint}")
        return folder, None
    with _refusals(name):
        found = cached_file(name, file, revision=revision)
        assert found is not None, "cached_file raises an error if there is no such file"
    folder = Path(found).parent
    return folder, folder.name if folder.parent.name == "snapshots" else None


def load_tokenizer(
    name: str, *, revision: str | None, chat_template: Path | None, trust_remote_code: bool = False
) -> Any:
    """The student's tokenizer, with another chat template if one is given.

    Raises:
        ValueError: there is no tokenizer or no such template, or it needs remote code that `trust_remote_code` does not
            allow.
    """
    if chat_template is not None and not chat_template.is_file():
        raise ValueError(f"--chat-template {chat_template}: there is no such file.")
    with _refusals(name):
        tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    return tokenizer


def load_model(
    name: str,
    *,
    revision: str | None,
    dtype: str,
    device: torch.device,
    lora: Path | None = None,
    trust_remote_code: bool = False,
    autocast: str | None = None,
) -> Any:
    """Load a causal language model, with a LoRA on top if one is given, and under autocast to a dtype if one is given.

    Raises:
        ValueError: there is no such model or dtype, it is not a causal language model, it needs remote code that
            `trust_remote_code` does not allow, or the adapter does not fit.
    """
    if autocast not in (None, "bfloat16", "float16"):
        raise ValueError(f"--autocast {autocast}: choose bfloat16 or float16.")
    if lora is not None:
        _require_adapter(lora)
    with _refusals(name):
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
    if lora is not None:
        model = _with_lora(model, lora)
    model = model.to(device).eval()
    if autocast is not None:  # as accelerate does it for a trainer
        rounded = torch.autocast(device.type, getattr(torch, autocast))(model.forward.__func__)
        model.forward = MethodType(convert_outputs_to_fp32(rounded), model)
    with reading(model):  # refuses models that are not causal
        pass
    return model


def pick_dtype(name: str, device: torch.device) -> str:
    """The dtype of a name. `auto` is bfloat16 on GPUs that have it in hardware, else float32.

    Raises:
        ValueError: there is no such dtype.
    """
    if name not in DTYPES:
        raise ValueError(f"--dtype {name}: choose one of {', '.join(DTYPES)}.")
    if name != "auto":
        return name
    # on a CPU, float32 costs little more than bfloat16, and ranks have no ties from rounding
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Turn the errors of transformers for a model that it cannot load into one sentence with the cure."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        message = str(error).strip()
        if "trust_remote_code" in message:
            raise ValueError(
                f"The model {name} comes with its own Python code, which would run with your permissions. Read the "
                "code first. If you trust it, add --trust-remote-code."
            ) from None
        reason = message.splitlines()[0].rstrip(".:") if message else type(error).__name__
        if "Unrecognized configuration class" in message:
            raise ValueError(
                f"{name} is not a causal language model ({reason.split('class ')[-1].split(' ')[0]}), so it has no "
                "next-token probabilities to score with. Give a decoder such as Llama, Qwen or SmolLM."
            ) from None
        raise ValueError(
            f"The model {name} cannot be loaded: {reason}. Give a folder with config.json, weights and tokenizer, or "
            "the name of a model on the hub that this machine can reach."
        ) from None


# ---- What a model is made of ----

_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")
"""Files that trainers write beside a model's weights."""
_PARTS = {
    "weights": ("*.safetensors", "*.bin"),
    "config": ("config.json", "generation_config.json", "adapter_config.json", "*.py"),
    "tokenizer": (
        "tokenizer*.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "*.model",
        "*.tiktoken",
    ),
}
"""The files of each part of a model. (The chat template is compared as text.)"""


def model_files(folder: Path, lora: Path | None) -> dict[str, str]:
    """Hashes of the files that a student's outputs depend on, by part and name: `"weights/model.safetensors"`.

    Args:
        folder: the folder of the model's files.
        lora: the adapter on the model, a folder or a name on the hub.

    Raises:
        OSError: a file cannot be read.
    """
    files: dict[str, Path] = {}
    for part, patterns in _PARTS.items():
        for pattern in patterns:
            found = [file for file in sorted(folder.glob(pattern)) if file.is_file() and file.name not in _NO_WEIGHTS]
            files |= {f"{part}/{file.name}": file for file in found}
            if found and part == "weights":
                break  # safetensors take precedence over .bin files
    if lora is not None:
        adapter, _ = locate(str(lora), file="adapter_config.json")
        files |= {f"adapter/{file.name}": file for file in sorted(adapter.glob("adapter_*")) if file.is_file()}
    return dict(zip(files, content_hashes(list(files.values())), strict=True))


def _require_adapter(lora: Path) -> None:
    """Check, before the model is loaded, that a LoRA is an adapter and that peft is installed."""
    try:
        from peft import PeftConfig
    except ImportError:
        raise ValueError("--lora needs peft: pip install peft.") from None
    try:
        PeftConfig.from_pretrained(str(lora))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--lora {lora} is not an adapter: {str(error).strip().splitlines()[0]}") from None


def _with_lora(model: Any, lora: Path) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(lora))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"--lora {lora} does not fit the model: {str(error).strip().splitlines()[0]}") from None
