"""A teacher in the same process, which reads each batch that the student is trained on."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill_sampler.dataset import ScoredDataset
from distill_sampler.objectives.divergence import Cells, Targets, blocks
from distill_sampler.protocols import ObjectiveTap
from distill_sampler.reading.head import LogitTransform, Project, linear
from distill_sampler.reading.head import module as through_the_head
from distill_sampler.reading.observer import ReadsAlong, transform_of
from distill_sampler.reading.structure import decoder_of, forward_of, unwrap
from distill_sampler.reading.token_stats import chunk_for, token_stats
from distill_sampler.types import Batch


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """Hidden states and attention of one forward pass of a decoder."""

    last: Tensor
    """`[rows, width, hidden]` the input of the output head."""
    layers: Mapping[int, Tensor]
    """`[rows, width, hidden]` the output of each layer that was requested."""
    attention: Mapping[int, Tensor]
    """`[rows, heads, width, width]` the attention of each layer that was requested."""


class Watch:
    """Records hidden states and attention of a decoder's layers in its forward passes.

    Args:
        model: a causal language model of transformers, wrapped or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        self.decoder: nn.Module = decoder_of(self.model)
        self._layers: set[int] = set()
        self._attention: set[int] = set()
        self._outputs: dict[int, Tensor] = {}
        self._maps: dict[int, Tensor] = {}

    def ask(self, *, layers: Collection[int] = (), attention: Collection[int] = ()) -> None:
        """Request the outputs of some layers, and the attention of some layers."""
        self._layers |= set(layers)
        self._attention |= set(attention)

    @contextmanager
    def open(self, then: Callable[[Seen], Tensor | None]) -> Iterator[None]:
        """A context in which `then` is called at the end of each forward pass of the decoder, still inside it.

        A tensor that `then` returns replaces `Seen.last` as the input of the output head; None leaves it unchanged.
        """
        with ExitStack() as hooks:
            for number, layer in enumerate(layers_of(self.model)):
                if number in self._layers:
                    hooks.callback(layer.register_forward_hook(self._keep(self._outputs, number)).remove)
                if number in self._attention:
                    hooks.callback(
                        attention_of(layer).register_forward_hook(self._keep(self._maps, number, part=1)).remove
                    )

            def at_the_end(decoder: nn.Module, args: Any, output: Any) -> Any:
                seen = Seen(last=output[0], layers=dict(self._outputs), attention=dict(self._maps))
                self._outputs.clear()
                self._maps.clear()
                if (last := then(seen)) is None:
                    return output
                if isinstance(output, tuple):
                    return (last, *output[1:])
                output.last_hidden_state = last
                return output

            hooks.callback(self.decoder.register_forward_hook(at_the_end).remove)
            yield

    @staticmethod
    def _keep(into: dict[int, Tensor], number: int, *, part: int = 0) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            into[number] = output[part] if isinstance(output, tuple) else output

        return keep


class LiveTeacher(ObjectiveTap):
    """A frozen causal language model as a teacher. Objectives with the same teacher share its forward pass.

    It is a tap of the run that adds nothing to the loss. When training starts, it freezes the teacher, puts it into
    evaluation mode and moves it to the student's device. It reads each batch whose scores are observed, and frees what
    was read once the batch has been trained on.

    Args:
        model: the teacher. If ZeRO-3 or FSDP2 has distributed its weights over the processes, it stays where it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sharded = is_sharded(model)
        """Whether its weights are distributed over the processes, which gather them for each of its forward passes."""
        self._head: tuple[Tensor, Tensor | None] | None = None
        """For a sharded teacher, the whole output head, from a forward pass until the batch has been trained on."""
        self.predicts = False
        """Whether its predictions are needed, and not only its states and attention."""
        self.observed = False
        """Whether scores are taken from it in training. Then it reads each batch, whatever the objectives weigh."""
        self.watch = Watch(model)
        parameters = inspect.signature(self.watch.decoder.forward).parameters
        self._takes = set(parameters) - {"use_cache"}
        if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
            self._takes |= _LIMITS
        self._seen: Seen | None = None
        self._read: Any = None

    @contextmanager
    def open(self, model: nn.Module, *, step: int) -> Iterator[None]:
        """A context in which it reads batches."""
        self.model.eval().requires_grad_(False)
        if not self.sharded:
            self.model.to(next(unwrap(model).parameters()).device)
        yield

    def before(self, batch: Batch) -> None:
        """Nothing: what it reads is announced by `expect`."""

    def expect(self, inputs: Mapping[str, Any], *, progress: float) -> None:
        if self.observed:
            self.read(inputs)

    def added_to(self, loss: Tensor, *, scale: float | Tensor) -> Tensor:
        return loss

    def after(self, batch: Batch) -> None:
        self.forget()

    @cached_property
    def transform(self) -> LogitTransform:
        """What it does to its logits after the head.

        Raises:
            ValueError: its logits are not the product of its decoder's hidden states and its output head.
        """
        return transform_of(self.model, purpose="SoftTargets(teacher=)")

    @torch.no_grad()
    def read(self, inputs: Mapping[str, Any]) -> Seen:
        """The teacher's states and attention for a batch. It reads a batch once, for all objectives.

        Args:
            inputs: the batch as the student reads it.
        """
        if self._read is not inputs["input_ids"]:
            taken = {name: value for name, value in inputs.items() if name in self._takes}
            if self.sharded:
                if self.predicts:
                    _ = self.transform  # a forward pass, which all processes must make now
                    require_plain_head(self.watch.model, what="SoftTargets(teacher=) of a sharded teacher")
                with self.watch.open(self._keep), forward_of(self.watch.model.get_output_embeddings(), self._at_head):
                    self.model(**taken, use_cache=False)
            else:
                with self.watch.open(self._keep):
                    self.watch.decoder(**taken, use_cache=False)
            self._read = inputs["input_ids"]
        assert self._seen is not None
        return self._seen

    def reads_along(self, extras: Collection[str] = ()) -> ReadsAlong:
        """A function that gives the statistics of tokens in the batch that it has read last. Each batch is read from
        now on.

        Args:
            extras: which optional statistics are wanted, as for `token_stats`.
        """
        self.observed = self.predicts = True
        chunk = chunk_for(self.watch.model.config.get_text_config().vocab_size)

        @torch.no_grad()
        def stats(places: Tensor, targets: Tensor) -> dict[str, Tensor]:
            assert self._seen is not None, "it reads before the student"
            states = self._seen.last.flatten(0, 1)[places]
            with torch.autocast(states.device.type, enabled=False):
                return token_stats(states, targets, self._project(), extras=extras, chunk=chunk)

        return stats

    def _keep(self, seen: Seen) -> None:
        self._seen = seen

    def _at_head(self, states: Tensor) -> Tensor:
        """In place of a sharded output head, where its weights are gathered: copies them where predictions are needed,
        and computes no logits."""
        if self.predicts:
            self._head = self._weights(copy=True)
        return states.new_zeros(*states.shape[:-1], 1)

    def _weights(self, *, copy: bool = False) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the output head."""
        head: nn.Module = self.watch.model.get_output_embeddings()
        weight, bias = head.weight, head.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        if copy:
            return weight.detach().clone(), None if bias is None else bias.detach().clone()
        return weight.detach(), None if bias is None else bias.detach()

    def _project(self, *, rounded: bool = False) -> Project:
        """Its logits of some states."""
        head: Any = self.watch.model.get_output_embeddings()
        if self._head is None and type(head) is not nn.Linear:  # quantised, with an adapter on it, ...
            return through_the_head(head, self.transform)
        weight, bias = self._weights() if self._head is None else self._head
        return linear(weight, bias, self.transform, rounded=rounded)

    def forget(self) -> None:
        """Free the states and attention of the last batch, and a gathered output head."""
        self._seen = self._read = self._head = None

    def targets(self, states: Tensor, *, temperature: float, columns: int) -> Targets:
        """The teacher's predictions.

        Args:
            states: `[positions, hidden]` the inputs of its output head.
            temperature: the temperature of the softmax.
            columns: how many columns count; see `shared_columns`.

        Raises:
            ValueError: its logits are not the product of its decoder's hidden states and its output head, or nobody
                said before training that its predictions are needed.
        """
        if not self.predicts:
            raise ValueError("The teacher gives no targets. Ask for it with setting.live(teacher, predicts=True).")
        project = self._project(rounded=True)

        def cells(start: int, stop: int) -> Cells:
            with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
                logits = project(states[start:stop])[:, :columns].div_(temperature)
                for block in blocks(*logits.shape):
                    logits[block] -= logits[block].logsumexp(1, keepdim=True)
                return Cells(log_probs=logits)

        return cells


def require_plain_head(model: nn.Module, *, what: str) -> None:
    """Check that the weight of a model's output head is all that the head multiplies with.

    Raises:
        ValueError: the head is quantised, or has an adapter on it.
    """
    head: nn.Module = unwrap(model).get_output_embeddings()
    trained = getattr(head, "modules_to_save", None)  # PEFT's wrapper around a module that is trained whole
    heads = list(trained.values()) if isinstance(trained, nn.ModuleDict) else [head]
    if not all(isinstance(each, nn.Linear) and each.weight.is_floating_point() for each in heads):
        kind = f"{type(head).__module__}.{type(head).__name__}"
        raise ValueError(
            f"{what} multiplies with the weight of the output head, but here the head is a {kind}, "
            "which does more. Leave the head out of the adapter (target_modules=, trainable_token_indices=) and out "
            "of quantisation, or train it whole with modules_to_save=['lm_head']."
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 or FSDP2 distributes a model's weights over the processes."""
    return any(isinstance(each, DTensor) or hasattr(each, "ds_tensor") for each in model.parameters())


_LIMITS = {"seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
"""Inputs other than position ids that tell a model where the samples of a packed row begin."""


class Setting:
    """What objectives know about their run.

    Args:
        dataset: the data set that is trained on.
        tokenizer: the student's; None: unknown.
    """

    def __init__(self, dataset: ScoredDataset, tokenizer: Any = None) -> None:
        self.dataset = dataset
        self.tokenizer = tokenizer
        self._live: dict[int, LiveTeacher] = {}

    @property
    def teachers(self) -> list[LiveTeacher]:
        """The live teachers that were asked for."""
        return list(self._live.values())

    def live(self, model: nn.Module, *, predicts: bool = False) -> LiveTeacher:
        """The live teacher of this model. Objectives with the same model share it and its forward pass.

        Ask for it in `Objective.tap`, so that the run knows its teachers before it starts.

        Args:
            model: the teacher.
            predicts: whether its predictions are needed (`targets`), and not only its states and attention.
        """
        teacher = self._live.setdefault(id(model), LiveTeacher(model))
        teacher.predicts |= predicts
        return teacher


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of a causal language model's decoder, from the input to the output.

    Raises:
        ValueError: the decoder has no list with one module for each layer of the configuration.
    """
    inner = unwrap(model)
    number = inner.config.get_text_config().num_hidden_layers
    for module in decoder_of(inner).modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise ValueError(
        f"{type(inner).__name__} has no list of {number} layers, so its hidden states cannot be matched. Leave "
        "objective= out for this model."
    )


def attention_of(layer: nn.Module) -> nn.Module:
    """The self-attention of a decoder layer.

    Raises:
        ValueError: it has none, as in linear or recurrent layers.
    """
    for name, module in layer.named_children():
        if name in ("self_attn", "attn", "attention", "self_attention"):
            return module
    raise ValueError(
        f"{type(layer).__name__} has no self-attention whose maps could be matched. Leave the layer out of layers=."
    )


def chosen_layers(layers: Mapping[int, int], student: nn.Module, teacher: nn.Module, *, what: str) -> dict[int, int]:
    """The pairs of layers of student and teacher to compare, with numbers from 0.

    Args:
        layers: the teacher's layer for each layer of the student; negative numbers count from the last layer.
        student: the student.
        teacher: the teacher.
        what: the objective's name, for the message.

    Raises:
        ValueError: there is no such layer.
    """
    chosen: dict[int, int] = {}
    for pair in layers.items():
        found: list[int] = []
        for number, model, whose in zip(pair, (student, teacher), ("student", "teacher"), strict=True):
            total = len(layers_of(model))
            if not isinstance(number, numbers.Integral) or not -total <= number < total:
                raise ValueError(
                    f"{what}(layers={dict(layers)}): the {whose} has {total} layers, so there is no layer {number!r}. "
                    f"Give numbers from 0 to {total - 1}, or from -1 to {-total} to count from the last."
                )
            found.append(int(number) % total)
        chosen[found[0]] = found[1]
    return chosen
