"""Loading the student for a command: the model, its tokenizer, a LoRA on top; refusals in one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import cached_file

from distill_sampler.content import content_hashes
from distill_sampler.reading.forward import reading

DTYPES = ("auto", "float32", "bfloat16", "float16")


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


def locate(name: str, *, revision: str | None = None, file: str = "config.json") -> tuple[Path, str | None]:
    """Where a model's files lie or will lie once they are loaded, and its commit, if it is from the hub.

    Args:
        name: a folder, or a name on the hub.
        revision: of a model on the hub.
        file: one that it must have.

    Raises:
        ValueError: there is no such model.
    """
    folder = Path(name)
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"There is no model folder {name}; check the path.")
    if folder.is_dir():
        if not (folder / file).exists():
            hint = ""
            if (folder / "adapter_config.json").exists():
                hint = " It is an adapter: give the base model with --model, and this folder with --lora."
            raise ValueError(f"The folder {name} holds no model (no {file}).{hint}")
        return folder, None
    with _refusals(name):
        found = cached_file(name, file, revision=revision)
        assert found is not None, "it raises where there is none"
    folder = Path(found).parent
    return folder, folder.name if folder.parent.name == "snapshots" else None


def load_tokenizer(
    name: str, *, revision: str | None, chat_template: Path | None, trust_remote_code: bool = False
) -> Any:
    """The student's tokenizer, with another chat template if one is given.

    Raises:
        ValueError: there is no tokenizer or no such template, or code that nobody has allowed to run comes with it.
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
) -> Any:
    """Load a causal language model, and put a LoRA on it if one is given.

    Raises:
        ValueError: it is not there, is not a causal language model, needs code of its own that nobody has allowed to
            run, or the adapter does not fit.
    """
    if lora is not None:
        _require_adapter(lora)
    with _refusals(name):
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
    if lora is not None:
        model = _with_lora(model, lora)
    model = model.to(device).eval()
    with reading(model):  # refuses what is not causal
        pass
    return model


def pick_dtype(name: str, device: torch.device) -> str:
    """`auto` is bfloat16 where an accelerator is fast at it, else float32.

    Raises:
        ValueError: there is no such dtype.
    """
    if name not in DTYPES:
        raise ValueError(f"--dtype {name}: choose one of {', '.join(DTYPES)}.")
    if name != "auto":
        return name
    # on a CPU float32 costs little more and gives ranks without bfloat16's ties
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """What transformers says about a model that it cannot load, in one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        said = str(error).strip()
        if "trust_remote_code" in said:
            raise ValueError(
                f"The model {name} brings Python code of its own, which would run here with your rights. Read it "
                "first; if you trust it, say so with --trust-remote-code."
            ) from None
        reason = said.splitlines()[0].rstrip(".:") if said else type(error).__name__
        if "Unrecognized configuration class" in said:
            raise ValueError(
                f"{name} is not a causal language model ({reason.split('class ')[-1].split(' ')[0]}), so it gives no "
                "probability to a response token by token. Give a decoder such as Llama, Qwen or SmolLM."
            ) from None
        raise ValueError(
            f"The model {name} cannot be loaded: {reason}. Give a folder with config.json, weights and tokenizer, or a "
            "name on the hub that this machine can reach."
        ) from None


# ---- What a model is made of ----

_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")
"""What trainers leave beside a model's weights."""
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
"""The files of each part; the chat template is compared as text."""


def model_files(folder: Path, lora: Path | None) -> dict[str, str]:
    """Hashes of the files that decide what a student says, by part and name: `"weights/model.safetensors"`.

    Args:
        folder: where the model's files lie.
        lora: an adapter that is on the model, a folder or a name on the hub.

    Raises:
        OSError: a file cannot be read.
    """
    files: dict[str, Path] = {}
    for part, patterns in _PARTS.items():
        for pattern in patterns:
            found = [file for file in sorted(folder.glob(pattern)) if file.is_file() and file.name not in _NO_WEIGHTS]
            files |= {f"{part}/{file.name}": file for file in found}
            if found and part == "weights":
                break  # where there are both, the safetensors are read
    if lora is not None:
        adapter, _ = locate(str(lora), file="adapter_config.json")
        files |= {f"adapter/{file.name}": file for file in sorted(adapter.glob("adapter_*")) if file.is_file()}
    return dict(zip(files, content_hashes(list(files.values())), strict=True))


def _require_adapter(lora: Path) -> None:
    """Before the model is loaded: is it an adapter, and can it be put on one here?"""
    try:
        from peft import PeftConfig
    except ImportError:
        raise ValueError("--lora needs peft: pip install peft.") from None
    try:
        PeftConfig.from_pretrained(str(lora))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--lora {lora} is no adapter: {str(error).strip().splitlines()[0]}") from None


def _with_lora(model: Any, lora: Path) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(lora))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"--lora {lora} does not fit the model: {str(error).strip().splitlines()[0]}") from None
