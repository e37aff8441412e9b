"""The student that scores rows, loaded by its name or given, and the options by which rows are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import nn

from distill_sampler.field_docs import documents_fields
from distill_sampler.integrations.loading import (
    load_model,
    load_tokenizer,
    locate,
    model_files,
    pick_device,
    pick_dtype,
)
from distill_sampler.reading.weights import content_of_weights
from distill_sampler.sources.candidates import Layout


@documents_fields
@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How rows are read and scored. The options of `distill-sampler score`, by the same names."""

    prompt_column: str | None = None
    """Column with the prompt, as text or messages. This and the other columns are found by their usual names, if they
    are not given."""
    response_column: str | None = None
    """Column with the response, as text or messages."""
    messages_column: str | None = None
    """Column with whole conversations."""
    candidates_column: str | None = None
    """Column with several responses to the row's prompt."""
    group_column: str | None = None
    """Column that is equal for rows that answer the same prompt."""
    teacher_column: str | None = None
    """Column with the teacher who wrote each response."""
    plain: bool = False
    """Read prompt and response as plain text, one after the other, without a chat template."""
    whole_text: bool = False
    """Score all of a text in which no response can be found."""
    chat_template: Path | None = None
    """File with a chat template to use instead of the model's."""
    max_length: int | None = None
    """Truncate rows to this many tokens; None: never."""
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; None: 1024 on a CPU and 16384 elsewhere."""
    share_prompts: bool = True
    """Read a prompt that several candidates share only once."""
    compile_layers: bool = False
    """Compile the model's layers (see `Scorer`)."""
    dtype: str = "auto"
    """The dtype of a model that is loaded by name, or `"auto"`."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """Compute as trainers do with `bf16=True` or `fp16=True`: from float32 weights that each product rounds."""
    device: str = "auto"
    """The device of a model that is loaded by name, or `"auto"`."""
    revision: str | None = None
    """Revision of a model on the hub."""
    lora: Path | None = None
    """Adapter to load on top of the model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    prompts: int | None = None
    """Score only the candidates of this many prompts, the first ones; None: of all."""
    traces: int = 0
    """For this many prompts, the first ones, the scores of every token are kept."""
    on_error: Literal["skip", "stop"] = "stop"
    """What to do with a row that cannot be used."""
    shard: tuple[int, int] | None = None
    """`(number, of)`, from 1: score only this share of the candidates; None: all."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"--max-length {self.max_length}: a prompt and a response have at least 2 tokens.")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(f"--batch-tokens {self.batch_tokens}: give a positive number, such as 8192.")
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            number, of = self.shard
            raise ValueError(f"--shard {number}/{of}: shards are counted from 1, so give one of 1/{of} to {of}/{of}.")

    @property
    def layout(self) -> Layout:
        """The columns that the user has named."""
        names = {name.removesuffix("_column"): value for name, value in vars(self).items() if name.endswith("_column")}
        return Layout(**names)


_FOR_LOADING = ("dtype", "autocast", "device", "revision", "lora", "trust_remote_code", "chat_template")
"""The options that are for a model that is loaded by its name."""


class Student:
    """A model that scores, with its tokenizer. Of a model with a name, the tokenizer is loaded first.

    Args:
        model: the model, its folder, or its name on the hub.
        tokenizer: its tokenizer; None: that of the name.
        options: how it is loaded.

    Raises:
        ValueError: there is no such model or tokenizer; the message names the option and the cure.
    """

    def __init__(self, model: nn.Module | str | Path, tokenizer: Any, options: RowOptions) -> None:
        self._options = options
        self.commit: str | None = None
        """Commit of a model from the hub."""
        if isinstance(model, nn.Module):
            if tokenizer is None:
                raise ValueError("tokenizer= is missing: a model that is given as an object needs its tokenizer.")
            defaults = {field.name: field.default for field in fields(options)}
            if given := [name for name in _FOR_LOADING if getattr(options, name) != defaults[name]]:
                raise ValueError(f"{given[0]}= is for a model that is loaded by its name, but this one is an object.")
            self.model = model  # in the place of the cached property
            self.name = type(model).__name__
            """Its folder, its name on the hub, or its class."""
            self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
            self.device = next(model.parameters()).device
            self._folder: Path | None = None
        else:
            self.name = str(model)
            self.device = pick_device(options.device)
            if options.autocast is not None and options.dtype not in ("auto", "float32"):
                raise ValueError(f"--autocast rounds float32 weights. Leave --dtype {options.dtype} out.")
            self.dtype = "float32" if options.autocast else pick_dtype(options.dtype, self.device)
            self._folder, self.commit = locate(self.name, revision=options.revision)
        self.tokenizer = tokenizer or load_tokenizer(
            self.name,
            revision=self.revision,
            chat_template=options.chat_template,
            trust_remote_code=options.trust_remote_code,
        )

    @property
    def revision(self) -> str | None:
        """The revision to load: the commit that was found first, so that all files are of the same one."""
        return self.commit or self._options.revision

    @cached_property
    def model(self) -> Any:
        """The model, loaded when it is first used."""
        options = self._options
        return load_model(
            self.name,
            revision=self.revision,
            dtype=self.dtype,
            device=self.device,
            lora=options.lora,
            trust_remote_code=options.trust_remote_code,
            autocast=options.autocast,
        )

    @cached_property
    def weights(self) -> str:
        """A hash of its weights."""
        return content_of_weights(self.model)

    def files(self) -> Mapping[str, str]:
        """Hashes of what it is made of, by part and name."""
        if self._folder is None:
            return {"weights/in memory": self.weights}
        return model_files(self._folder, self._options.lora)
