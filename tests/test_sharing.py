"""Prompts that are read once: shared only where that is exact, and given up at the first doubt."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from typer.testing import CliRunner

from distill_sampler.cli import app
from distill_sampler.protocols import PassInfo
from distill_sampler.reading import sharing
from distill_sampler.reading.batching import Wave, token_batches, waves
from distill_sampler.reading.forward import Forward, reading
from distill_sampler.reading.model_reader import ModelReader, _Session
from distill_sampler.reading.sharing import can_share, trial
from distill_sampler.types import TokenStats, View
from tests import tiny, zoo


def views_of(*shapes: tuple[int, int], each: int = 3) -> list[View]:
    """Random tokens: of each prompt some responses, the first of so many tokens, the others a little longer."""
    rng = np.random.default_rng(0)
    views = []
    for prompt, response in shapes:
        start = rng.integers(1, 250, prompt)
        for more in range(each):
            ids = np.concatenate([start, rng.integers(1, 250, response + 9 * more)])
            views.append(View(input_ids=ids, scored=np.arange(len(ids)) >= prompt))
    return views


ROWS = tiny.candidates()
VIEWS = views_of((24, 8), (31, 9), (38, 10), (45, 11))


def shares(model: torch.nn.Module, tokens: int = 0, **settings: Any) -> bool:
    with reading(model, **settings) as forward:
        return can_share(forward, VIEWS, tokens=tokens)


def read(model: torch.nn.Module, views: list[View] = VIEWS, **settings: Any) -> list[TokenStats]:
    with ModelReader(model, batch_tokens=300, **settings).open(PassInfo(examples=views)) as read:
        return list(read(views))


def assert_like_whole(model: torch.nn.Module, found: list[TokenStats]) -> None:
    for one, whole in zip(found, read(model, share_prompts=False), strict=True):
        np.testing.assert_allclose(one.surprisal, whole.surprisal, atol=1e-4)
        assert np.array_equal(one.rank, whole.rank)


def test_a_llama_shares_prompts(model: PreTrainedModel) -> None:
    assert shares(model, extras=("entropy", "top1", "sum_p2"))
    assert shares(model.bfloat16())


# Falcon-H1 and Inkling have caches of two kinds of layers, DeepSeek-V4 compresses its keys, MiniMax permutes its cache
CACHES_OF_THEIR_OWN = ["falcon_h1", "inkling_text", "deepseek_v4", "minimax"]


@pytest.mark.parametrize("model_type", CACHES_OF_THEIR_OWN)
def test_a_cache_of_its_own_kind_is_not_shared_and_the_scores_are_right(model_type: str) -> None:
    model = zoo.build(model_type)
    assert not shares(model)
    assert_like_whole(model, read(model))


@pytest.mark.parametrize("model_type", ["falcon_h1", "minimax"])
def test_the_trial_alone_finds_a_cache_that_does_not_follow(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Everything:
        def __contains__(self, kind: str) -> bool:
            return True

    monkeypatch.setattr(sharing, "_KNOWN", Everything())
    assert not shares(zoo.build(model_type))


def test_a_subclass_of_a_known_cache_is_another_kind(model: PreTrainedModel) -> None:
    class Own(DynamicCache):
        pass

    forward = model.model.forward

    def with_own_cache(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("use_cache") and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = Own(config=model.config)
        return forward(*args, **kwargs)

    assert shares(model)
    model.model.forward = with_own_cache
    assert not shares(model)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "deepseek_v32"])  # all three kinds of layers
def test_what_is_kept_of_a_prompt_is_never_changed(model_type: str) -> None:
    model = zoo.build(model_type)
    with reading(model) as forward:
        tried = trial(VIEWS, positions=512)
        assert tried is not None
        prefix = forward.prefix(tried.prompts)

        def kept() -> Iterator[torch.Tensor]:
            for layer in prefix.cache.layers:
                yield from (value for value in vars(layer).values() if isinstance(value, torch.Tensor))

        before = [tensor.clone() for tensor in kept()]
        first, second = (forward(tried.views, prefix, tried.rows) for _ in range(2))
        assert all(torch.equal(left, right) for left, right in zip(kept(), before, strict=True))
    for left, right in zip(first, second, strict=True):
        assert np.array_equal(left.surprisal, right.surprisal)


def test_a_cache_that_is_permuted_in_place_shows_the_second_time(model: PreTrainedModel) -> None:
    """As MiniMax's: the first sequences that go on are right, all later ones have each other's prompts."""

    def permuting(prefix: Any, rows: Any) -> Any:
        places = torch.tensor(rows)
        for layer in prefix.cache.layers:
            layer.batch_select_indices(places)
        return prefix.cache, prefix.mask[places], prefix.lengths[np.asarray(rows)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing.Prefix, "take", permuting)
        assert not shares(model)


def test_a_hundredth_of_a_nat_is_too_much(model: PreTrainedModel) -> None:
    forward = model.model.forward

    def slightly_off(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            output[0].mul_(1.01)
        return output

    assert shares(model)
    model.model.forward = slightly_off
    with reading(model) as forward_:
        tried = trial(VIEWS, positions=512)
        assert tried is not None
        whole, shared = forward_(tried.views), forward_(tried.views, forward_.prefix(tried.prompts), tried.rows)
    errors = np.concatenate([np.abs(a.surprisal - b.surprisal) for a, b in zip(whole, shared, strict=True)])
    assert 1e-3 < errors.mean() < 0.1
    assert not shares(model)


@pytest.mark.parametrize(
    ("name", "change", "same"),
    [
        ("surprisal", 0.5e-4, True),
        ("surprisal", 2e-4, False),
        ("entropy", 2e-4, False),
        ("top1", 2e-4, False),
        ("sum_p2", 2e-4, False),
        ("rank", 1, True),  # a near tie
        ("rank", 2, False),
    ],
)
def test_every_statistic_of_every_token_must_be_the_same(name: str, change: float, same: bool) -> None:
    def stats(**changes: float) -> list[TokenStats]:
        values = dict.fromkeys(("surprisal", "entropy", "top1", "sum_p2"), np.ones(99, np.float32))
        ranks = np.full(99, 7)
        ranks[50] += int(changes.pop("rank", 0))
        for key, by in changes.items():
            values[key] = values[key].copy()
            values[key][50] += by
        return [TokenStats(rank=ranks, ties=np.zeros(99, np.int64), **values)]

    assert (not sharing._difference(stats(), stats(**{name: change}), exact=True)) == same


@pytest.mark.parametrize(
    ("everywhere", "at_one_token", "same"),
    [(0.04, 0.0, True), (0.06, 0.0, False), (0.0, 0.45, True), (0.0, 0.55, False)],
)
def test_in_low_precision_the_mean_and_the_largest_change_are_bounded(
    everywhere: float, at_one_token: float, same: bool
) -> None:
    before, after = np.ones(99, np.float32), np.full(99, 1 + everywhere, np.float32)
    after[50] += at_one_token
    one, other = ([TokenStats(surprisal=values, rank=np.full(99, 7))] for values in (before, after))
    assert (not sharing._difference(one, other, exact=False)) == same


def view(prompt: int, response: int) -> View:
    ids = np.arange(1, prompt + response + 1)
    return View(input_ids=ids, scored=np.arange(len(ids)) > prompt)


@pytest.mark.parametrize(("response", "shared"), [(12, True), (13, False)])
def test_a_prompt_is_shared_where_that_saves_a_fifth(response: int, shared: bool) -> None:
    """Two views of a prompt of 8 tokens: 8 are saved of 40, or of 42."""
    views = [view(8, response), view(8, response)]
    found = list(waves(views, [one.shareable for one in views], budget=1))
    assert any(wave.prompts for wave in found) is shared


def test_prompts_are_shared_where_that_saves_more_than_a_forward_costs() -> None:
    views = [view(20, 5) for _ in range(3)]  # saves 40 tokens
    for budget, shared in ((320, True), (321, False)):
        found = list(waves(views, [one.shareable for one in views], budget=budget))
        assert any(wave.prompts for wave in found) is shared


def test_a_batch_may_be_exactly_full_and_kept_prompts_count_a_quarter() -> None:
    assert [len(batch) for batch in token_batches(np.array([5, 5, 5]), 10)] == [2, 1]
    views = [view(40, 10) for _ in range(4)]
    # each goes on with 10 tokens, from 40 that take the memory of 10
    for budget, sizes in ((40, [2, 2]), (39, [1, 1, 1, 1])):
        (wave,) = waves(views, [one.shareable for one in views], budget=budget)
        assert [len(prompt) for prompt in wave.prompts] == [40]
        assert [len(batch) for batch in wave.batches] == sizes


def test_a_wave_is_renumbered_with_its_prompts() -> None:
    wave = Wave(prompts=[np.arange(3), np.arange(4)], row={0: 1, 1: 0, 2: 1}, batches=[[1], [2, 0]])
    moved = wave.renumbered(np.array([7, 5, 9]))
    assert moved.row == {7: 1, 5: 0, 9: 1}
    assert moved.batches == [[5], [9, 7]]


def test_prompts_are_tried_past_the_sliding_window_where_that_costs_little() -> None:
    model = zoo.build("mistral", sliding_window=100)
    forward = model.model.forward

    def wrong_past_the_window(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if kwargs.get("past_key_values") is not None and kwargs["attention_mask"].shape[1] > 100:
            output[0].mul_(2)
        return output

    assert shares(model, tokens=1000)
    model.model.forward = wrong_past_the_window
    assert not shares(model, tokens=1000)
    assert shares(model, tokens=500)  # the window is too long to try


def test_the_trial_has_prompts_of_different_length_and_several_sequences_for_some_of_them() -> None:
    tried = trial(VIEWS[:1], positions=512)
    assert tried is not None
    assert len({len(prompt) for prompt in tried.prompts}) == len(tried.prompts) == 3
    assert list(tried.rows) == [1, 0, 1, 2, 0]
    for view, row in zip(tried.views, tried.rows, strict=True):
        assert np.array_equal(view.input_ids[: len(tried.prompts[row])], tried.prompts[row])
        assert not view.scored[: len(tried.prompts[row]) + 1].any()
    assert len({view.identity for view in tried.views}) == 5
    assert trial([], positions=512) is None
    assert trial(VIEWS, positions=20) is None


def test_an_error_while_trying_means_whole_sequences(model: PreTrainedModel) -> None:
    def no_cache(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs.get("past_key_values") is not None:
            raise AttributeError("'LinearAttentionLayer' object has no attribute 'batch_select_indices'")

    model.model.register_forward_pre_hook(no_cache, with_kwargs=True)
    assert not shares(model)
    assert_like_whole(model, read(model))


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_error_later_means_whole_sequences_and_the_pass_goes_on(
    model: PreTrainedModel, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    shared = []

    def fails_later(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs.get("past_key_values") is not None:
            shared.append(len(kwargs["input_ids"]))
            if len(shared) > 2 + after:  # the trial takes two
                raise RuntimeError("Sizes of tensors must match")

    model.model.register_forward_pre_hook(fails_later, with_kwargs=True)
    views = views_of((60, 20), (61, 20), (62, 20), each=5)
    reader = ModelReader(model, batch_tokens=300)
    progress: list[int] = []
    with caplog.at_level(logging.WARNING), reader.open(PassInfo(examples=views, progress=progress.append)) as read:
        found = list(read(views))
        count = len(shared)
        again = list(read(views))
    assert count == 2 + after + 1
    assert len(shared) == count  # no other one was tried
    assert caplog.text.count("Sizes of tensors must match") == 1
    assert sum(progress) == 2 * sum(len(view.input_ids) for view in views)
    with ModelReader(model, share_prompts=False).open(PassInfo()) as read:
        whole = read(views)
    for one, other, two in zip(found, again, whole, strict=True):
        np.testing.assert_allclose(one.surprisal, two.surprisal, atol=1e-4)
        np.testing.assert_allclose(other.surprisal, two.surprisal, atol=1e-4)


def test_an_error_of_whole_sequences_is_an_error(model: PreTrainedModel) -> None:
    def fails(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] > 50:
            raise RuntimeError("no kernel")

    model.model.register_forward_pre_hook(fails, with_kwargs=True)
    with pytest.raises(RuntimeError, match="no kernel"):
        read(model, share_prompts=False)


class Others:
    """Two processes, of which this is one: what the other one says each time the largest number is asked for."""

    world_size = 2

    def __init__(self, *said: int) -> None:
        self.said = list(said)

    def max_over_ranks(self, number: int) -> int:
        return max(number, self.said.pop(0))


def session(forward: Forward, ranks: Any) -> _Session:
    return _Session(forward, PassInfo(examples=VIEWS), ranks, budget=300, sharing=None)


def count_shared(forward: Forward, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each forward after the trial, whether it goes on from prompts."""
    seen: list[bool] = []
    plain = Forward.begin

    def noting(self: Forward, views: Any, prefix: Any = None, rows: Any = ()) -> Any:
        seen.append(prefix is not None)
        return plain(self, views, prefix, rows)

    monkeypatch.setattr(Forward, "begin", noting)
    return seen


def test_what_one_process_cannot_share_none_shares(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with reading(model) as forward:
        for cannot in (0, 1):
            monkeypatch.undo()
            seen = count_shared(forward, monkeypatch)
            # it wants to share; whether it cannot; its forward passes; whether it failed
            work = session(forward, Others(1, cannot, 0, 0))
            work.read(VIEWS)
            assert work.sharing is (not cannot)
            assert any(seen[3:]) is (not cannot)  # three are the trial's


def test_when_sharing_fails_on_one_process_all_go_on_together(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reading(model) as forward:
        # in a second round, the other one reads its sequences whole with seven forward passes
        ranks = Others(1, 0, 0, 2, 7, 0)
        work = session(forward, ranks)
        seen = count_shared(forward, monkeypatch)
        found = work.read(VIEWS)
        assert not work.sharing
        assert seen[-7:] == [False] * 7
        assert ranks.said == []
    monkeypatch.undo()
    assert_like_whole(model, found)


def test_the_command_line_can_turn_sharing_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.model().save_pretrained(tmp_path / "student")
    tiny.tokenizer().save_pretrained(tmp_path / "student")
    rows = [{"prompt": row["prompt"][0]["content"] * 3, "response": row["completion"][0]["content"]} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = []
    plain = Forward.prefix
    monkeypatch.setattr(Forward, "prefix", lambda self, prompts: read.append(prompts) or plain(self, prompts))
    for option, shared in (("--share-prompts", True), ("--no-share-prompts", False)):
        read.clear()
        files = [str(tmp_path / name) for name in ("rows.jsonl", f"{option}.parquet", "student")]
        command = ["score", files[0], "--output", files[1], "--model", files[2], option, "--batch-tokens", "300"]
        result = CliRunner().invoke(app, [*command, "--dtype", "float32", "--device", "cpu"])
        assert result.exit_code == 0, result.output
        assert bool(read) is shared
