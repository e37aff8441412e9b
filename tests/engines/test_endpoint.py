"""`EndpointReader` against a server on this machine: its numbers, and what becomes of failures.

The server answers in the shapes that vLLM 0.32 was seen to answer in; `test_real_engines.py` asks real ones.
"""

import json
import pickle
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_sampler import Curriculum, KeepTop, ScoredDataset
from distill_sampler.engines import client
from distill_sampler.engines.client import Refusal, ServerGone
from distill_sampler.engines.completions import Answer, strict_ranks
from distill_sampler.engines.endpoint import EndpointReader
from distill_sampler.engines.stored_teacher import StoredTeacher
from distill_sampler.metrics import ExcessLoss
from distill_sampler.protocols import PassInfo
from distill_sampler.reading.model_reader import ModelReader
from distill_sampler.testing import check_reader
from distill_sampler.types import View
from tests import tiny
from tests.cli.conftest import Ended, call, rows, write_lines
from tests.engines.served import Served, serving


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(client, "_FIRST_WAIT", 0.001)
    with serving(Served(tiny.model(3).eval(), tiny.tokenizer())) as found:
        yield found


def reader(served: Served, **settings: Any) -> EndpointReader:
    return EndpointReader(served.url, **{"model": "tiny", "tokenizer": served.tokenizer, "retries": 2, **settings})


def views(count: int = 5) -> list[View]:
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        length = int(rng.integers(8, 40))
        made.append(View(input_ids=rng.integers(250, size=length), scored=np.arange(length) > 1 + number % 3))
    return made


def read(it: EndpointReader, shown: list[View]) -> list[Any]:
    with it.open(PassInfo()) as function:
        return list(function(shown))


# ---- Numbers ----


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"form": "echo"}], ids=["ids", "top k", "echo"])
def test_it_keeps_the_contract_of_readers(settings: dict[str, Any], served: Served) -> None:
    served.max_model_len = 33
    check_reader(reader(served, **settings), unlike=reader(served, **settings, revision="later"), vocabulary=250)


@pytest.mark.parametrize("settings", [{"top_k": 300 - 42}, {"top_k": 4}, {"form": "echo"}])
def test_it_gives_the_numbers_of_the_model(settings: dict[str, Any], served: Served) -> None:
    with ModelReader(served.model, top_k=4).open(PassInfo()) as of_model:
        expected = of_model(views())
    for own, found in zip(expected, read(reader(served, **settings), views()), strict=True):
        np.testing.assert_allclose(found.surprisal, own.surprisal, atol=1e-4)
        if settings.get("top_k") == 4:
            np.testing.assert_array_equal(found.top_ids, own.top_ids)
            np.testing.assert_allclose(found.top_logprobs, own.top_logprobs, atol=1e-4)
        if "top_k" in settings:
            np.testing.assert_array_equal(found.rank, own.rank)


def test_an_echo_may_give_tokens_as_text(served: Served) -> None:
    """As SGLang does, by its source."""

    def as_texts(found: dict[str, Any]) -> dict[str, Any]:
        given = found["choices"][0]["logprobs"]
        ids = [int(token.partition(":")[2]) for token in given["tokens"]]
        given["tokens"] = [served.tokenizer.decode([token]) for token in ids]
        return found

    expected = read(reader(served, form="echo"), views())
    served.always = as_texts
    for own, found in zip(expected, read(reader(served, form="echo"), views()), strict=True):
        np.testing.assert_array_equal(found.surprisal, own.surprisal)
    served.always = lambda found: shifted(as_texts(found))
    with pytest.raises(ValueError, match="echo is of other places"):
        read(reader(served, form="echo"), views())


def test_ranks_that_count_equal_logits_are_counted_again() -> None:
    """Logits 3 2 2 2 1 1 0: vLLM counts with >=."""
    top = np.log(np.array([0.4, 0.2, 0.2, 0.2]))
    own = np.array([top[0], top[1], top[1], -9.0])
    engines = np.array([1, 4, 4, 6])
    found = Answer(logprob=own, rank=engines, top_ids=np.zeros((4, 4), np.int64), top_logprobs=np.tile(top, (4, 1)))
    assert strict_ranks(found).tolist() == [1, 2, 2, 6]
    # two likeliest tokens suffice for a token that is as likely as the second
    fewer = replace(found, top_ids=found.top_ids[:, :2], top_logprobs=found.top_logprobs[:, :2])
    assert strict_ranks(fewer).tolist() == [1, 2, 2, 6]


def test_ranks_are_offered_only_with_what_corrects_them(served: Served) -> None:
    assert "rank" not in reader(served).statistics
    assert read(reader(served), views())[0].rank is None
    assert "rank" in reader(served, top_k=3).statistics
    assert "3" in reader(served, top_k=3).numerics["ties"]
    assert reader(served, top_k=3).identity != reader(served, top_k=4).identity


def test_minus_infinity_is_not_minus_9999(served: Served) -> None:
    def never(found: dict[str, Any]) -> dict[str, Any]:
        for entries in found["choices"][0]["prompt_logprobs"][1:]:
            for entry in entries.values():
                entry["logprob"] = -9999.0
        return found

    it = reader(served)
    with it.open(PassInfo()) as function:
        served.changes = [never]
        assert np.isinf(function(views(1))[0].surprisal).all()


def test_it_asks_for_the_model_as_it_is(served: Served) -> None:
    read(reader(served), views(1))
    for body in served.asked:
        assert (body["temperature"], body["top_p"], body["repetition_penalty"]) == (1.0, 1.0, 1.0)
        assert body["add_special_tokens"] is False
        assert body["model"] == "tiny"


def test_a_key_is_read_from_the_environment_and_kept_nowhere(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="key_variable"):
        reader(served, key_variable="NO_SUCH_KEY")
    monkeypatch.setenv("TEACHER_KEY", "s3cret")
    it = reader(served, key_variable="TEACHER_KEY")
    read(it, views(1))
    assert served.headers[-1]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in it.identity + repr(it)
    assert b"s3cret" not in pickle.dumps(it)


def test_a_metric_reads_its_reference_through_it(served: Served) -> None:
    tokenizer = tiny.tokenizer()
    dataset = ScoredDataset(tiny.tokenised(tiny.candidates(2), tokenizer), end_token_ids=[257])
    scores = []
    for reference in (ModelReader(served.model), reader(served)):
        metric = ExcessLoss(reference=reference, tokenizer=tokenizer)
        curriculum = Curriculum(metrics=[metric], policies=[KeepTop("excess_loss", fraction=0.5)])
        curriculum.bind(dataset)
        curriculum.start_epoch(0, tiny.model())
        scores.append(curriculum.store.latest["reference_loss"])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)


# ---- Failures ----


def no_json(found: dict[str, Any]) -> bytes:
    return json.dumps(found).encode()[:-20]


def slow(found: dict[str, Any]) -> dict[str, Any]:
    time.sleep(1.5)
    return found


PASSING = {
    "too many requests": lambda found: 429,
    "an error of the server": lambda found: 500,
    "not there yet": lambda found: 503,
    "half an answer": no_json,
    "a dead line": lambda found: None,
    "no answer in time": slow,
}


def patience(kind: str) -> float:
    """Short only where it is to run out, since this machine may be busy."""
    return 0.7 if kind == "no answer in time" else 60


@pytest.mark.parametrize("kind", PASSING)
def test_what_passes_is_tried_again(kind: str, served: Served) -> None:
    it = reader(served, timeout=patience(kind))
    expected = read(it, views())
    with it.open(PassInfo()) as function:
        served.asked.clear()
        served.changes = [PASSING[kind], PASSING[kind]]
        found = function(views())
    assert len(served.asked) == len(views()) + 2
    for own, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(own.surprisal, other.surprisal)


def test_trouble_is_told_once_until_it_is_over(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    it = reader(served, concurrency=1)
    with it.open(PassInfo()) as function:
        served.changes = [lambda found: 503, lambda found: 503, lambda found: found, lambda found: 429]
        function(views())
    assert [record.message.partition("status ")[2][:3] for record in caplog.records] == ["503", "429"]
    assert "up to 2 times" in caplog.text


def test_a_mistyped_address_is_told_soon(served: Served) -> None:
    served.always = lambda found: 503
    with pytest.raises(ServerGone, match="4 tries"):
        read(reader(served, retries=50), views())


def test_a_server_that_asks_for_patience_gets_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client._wait(0, "7") == 7
    assert client._wait(0, "3600") == 60
    assert client._wait(0, "tomorrow") < 1
    monkeypatch.undo()
    assert 0.3 < client._wait(0, None) < 0.7
    assert 3 < client._wait(3, None) < 5.1
    assert client._wait(30, None) == 60


@pytest.mark.parametrize("kind", PASSING)
def test_a_server_that_stays_away_ends_the_pass(kind: str, served: Served) -> None:
    it = reader(served, timeout=patience(kind), concurrency=2)
    found = it.each(views())
    next(found)
    served.always = PASSING[kind]
    with pytest.raises(ServerGone, match=r"3 tries"):
        list(found)


def test_nobody_at_the_address(served: Served) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        it = EndpointReader(nobody, model="tiny", tokenizer=tiny.tokenizer(), retries=1)
        with pytest.raises(ServerGone, match=r"no connection.*Check that the server runs"):
            read(it, views())


def test_one_request_that_always_fails_is_that_request_s_fault(served: Served) -> None:
    shown = views()
    longest = max(len(view.input_ids) for view in shown)

    def fails(found: dict[str, Any]) -> Any:
        return 500 if found["usage"]["prompt_tokens"] == longest else found

    served.always = fails
    found = list(reader(served, concurrency=2).each(shown))
    assert [isinstance(each, Refusal) for each in found] == [len(view.input_ids) == longest for view in shown]
    with pytest.raises(ValueError, match=r"--on-error skip"):
        read(reader(served), shown)


@pytest.mark.parametrize(("status", "cure"), [(401, "--key-variable"), (403, "--key-variable"), (404, "model's name")])
def test_a_server_that_serves_nobody_is_not_asked_again(status: int, cure: str, served: Served) -> None:
    served.always = lambda found: status
    with pytest.raises(ServerGone, match=cure):
        read(reader(served), views())
    assert len(served.asked) == 1


def choice(**changed: Any) -> Any:
    return lambda found: {**found, "choices": [{**found["choices"][0], **changed}]}


def cut(found: dict[str, Any]) -> dict[str, Any]:
    found["choices"][0]["prompt_logprobs"].pop()
    return found


def shifted(found: dict[str, Any]) -> dict[str, Any]:
    given = found["choices"][0]["logprobs"]["token_logprobs"]
    given[1:] = [*given[2:], -3.0]
    return found


def of_another(found: dict[str, Any]) -> dict[str, Any]:
    for number, entries in enumerate(found["choices"][0]["prompt_logprobs"][1:]):
        found["choices"][0]["prompt_logprobs"][number + 1] = {"99999": next(iter(entries.values()))}
    return found


def positive(found: dict[str, Any]) -> dict[str, Any]:
    for entries in found["choices"][0]["prompt_logprobs"][1:]:
        next(iter(entries.values()))["logprob"] = 0.5
    return found


def words(found: dict[str, Any]) -> dict[str, Any]:
    for entries in found["choices"][0]["prompt_logprobs"][1:]:
        next(iter(entries.values()))["decoded_token"] = " other"
    return found


WRONG = {
    "an echo alone": ("prompt_logprobs", choice(prompt_logprobs=None), r"--form echo"),
    "llama.cpp's": ("echo", choice(logprobs={"content": [{"id": 1, "logprob": -1.0}]}), r"llama\.cpp.*vLLM"),
    "OpenAI's": ("echo", choice(logprobs={"tokens": ["a"], "token_logprobs": [-1.0]}), r"only of what it generates"),
    "no choice": ("prompt_logprobs", lambda found: {"choices": []}, r"address of a completions endpoint"),
    "a list": ("prompt_logprobs", lambda found: b"[1]", r"not an object"),
    "a token more": (
        "prompt_logprobs", lambda found: {**found, "usage": {"prompt_tokens": 99}}, r"99 tokens.*adds none of its own",
    ),
    "a number less": ("prompt_logprobs", cut, r"log-probabilities of \d+ tokens"),
    "other tokens": ("prompt_logprobs", of_another, r"not the one that was sent"),
    "positive": ("prompt_logprobs", positive, r"none is above 0"),
    "entries of another shape": ("prompt_logprobs", choice(prompt_logprobs=[None, 3]), r"log-probabilities of 2"),
    "another vocabulary": ("prompt_logprobs", words, r"tokenizer="),
    "other places": ("echo", shifted, r"echo is of other places"),
    "a request refused": ("prompt_logprobs", lambda found: 400, r"status 400"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_server_that_cannot_be_used_is_refused_before_anything_is_read(kind: str, served: Served) -> None:
    form, served.always, cure = WRONG[kind]
    with pytest.raises(ValueError, match=cure):
        read(reader(served, form=form), views())
    assert len(served.asked) <= 3


def test_fewer_likeliest_tokens_than_wanted_are_refused(served: Served) -> None:
    def two(found: dict[str, Any]) -> dict[str, Any]:
        given = found["choices"][0]["prompt_logprobs"]
        given[1:] = [dict(list(entries.items())[:2]) for entries in given[1:]]
        return found

    served.always = two
    with pytest.raises(ValueError, match=r"--max-logprobs"):
        read(reader(served, top_k=5), views())


ARGUMENTS = {
    "url": {"url": "localhost:8000"},
    "form": {"form": "chat"},
    "top_k": {"form": "echo", "top_k": 3},
    "concurrency": {"concurrency": 0},
    "timeout": {"timeout": 0},
    "retries": {"retries": -1},
    "tokenizer": {"tokenizer": None},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    given = {"url": "http://localhost:1/v1", "model": "tiny", "tokenizer": tiny.tokenizer(), **ARGUMENTS[name]}
    with pytest.raises(ValueError, match=f"{name}="):
        EndpointReader(given.pop("url"), **given)


def test_the_longest_view_leaves_room_for_a_token(served: Served) -> None:
    assert reader(served).positions == 511
    served.max_model_len = None
    assert reader(served).positions == float("inf")
    assert reader(served, model="another").positions == float("inf")
    served.has_models = False
    assert reader(served).positions == float("inf")


# ---- A store ----


@pytest.fixture
def teacher_path(served: Served, tmp_path: Path) -> Path:
    folder = tmp_path / "teacher"
    served.model.save_pretrained(folder)
    served.tokenizer.save_pretrained(folder)
    return folder


def made(served: Served, data: Path, output: Path, *more: object) -> Ended:
    tokenizer = output.parent / "teacher"
    asked = ("--endpoint", served.url, "--model", "tiny", "--tokenizer", tokenizer, "--retries", 2)
    return call("teacher-logprobs", data, "--output", output, *asked, *more)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "candidates.jsonl", rows())


def test_a_store_from_a_server_is_that_of_the_loaded_model(
    served: Served, data: Path, teacher_path: Path, tmp_path: Path
) -> None:
    ended = made(served, data, tmp_path / "asked.arrow", "--top-k", 3)
    assert ended.code == 0, ended.said
    loaded = call("teacher-logprobs", data, "--output", tmp_path / "t.arrow", "--model", teacher_path, "--top-k", 3)
    assert loaded.code == 0, loaded.said
    one, other = StoredTeacher(tmp_path / "asked.arrow"), StoredTeacher(tmp_path / "t.arrow")
    assert (one.facts["source"], one.facts["model"], one.top_k) == ("endpoint", "tiny", 3)
    assert served.url not in str(one.facts)
    for row in rows():
        asked, own = one.find(row["response"]), other.find(row["response"])
        assert asked is not None
        assert own is not None
        np.testing.assert_allclose(asked.surprisal, own.surprisal, atol=1e-4)
        np.testing.assert_array_equal(asked.token_ids, own.token_ids)
        np.testing.assert_array_equal(asked.begins, own.begins)
        assert asked.top_logprobs is not None
        np.testing.assert_allclose(asked.top_logprobs, own.top_logprobs, atol=0.01)
    assert "nothing to do" in made(served, data, tmp_path / "asked.arrow", "--top-k", 3).said


def test_what_was_answered_before_an_outage_is_kept(
    served: Served, data: Path, teacher_path: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole.arrow", tmp_path / "broken.arrow"
    assert made(served, data, whole).code == 0
    served.changes = [lambda found: found] * 8  # one of them is the trial
    served.always = lambda found: 503
    ended = made(served, data, broken, "--concurrency", 1, "--on-error", "skip")  # which is not about outages
    assert ended.code == 1
    assert "run the same command again" in ended.said
    served.always, before = None, len(served.asked)
    ended = made(served, data, broken, "--concurrency", 1)
    assert "Continuing after 7 responses" in ended.said
    assert len(served.asked) - before < len(rows()) - 2  # the trial and the rest; a request may still be under way
    for row in rows():
        one, other = (StoredTeacher(path).find(row["response"]) for path in (whole, broken))
        assert one is not None
        assert other is not None
        np.testing.assert_allclose(one.surprisal, other.surprisal, atol=1e-5)


def test_a_response_that_the_server_refuses_is_named_or_passed_over(
    served: Served, data: Path, teacher_path: Path, tmp_path: Path
) -> None:
    assert made(served, data, tmp_path / "all.arrow").code == 0
    longest = max(len(body["prompt"]) for body in served.asked)
    served.always = lambda found: 400 if found["usage"]["prompt_tokens"] == longest else found
    ended = made(served, data, tmp_path / "t.arrow")
    assert (ended.code, "status 400" in ended.said, "--on-error skip" in ended.said) == (1, True, True)
    ended = made(served, data, tmp_path / "t.arrow", "--on-error", "skip")
    assert ended.code == 0, ended.said
    store = StoredTeacher(tmp_path / "t.arrow")
    found = [store.find(row["response"]) for row in rows()]
    assert None in found
    assert any(each is not None for each in found)


def test_numbers_of_another_model_are_not_mixed_in(
    served: Served, data: Path, teacher_path: Path, tmp_path: Path
) -> None:
    served.changes = [lambda found: found] * 8
    served.always = lambda found: 503
    assert made(served, data, tmp_path / "t.arrow", "--concurrency", 1).code == 1
    served.always = None
    for more in (("--model", "other"), ("--revision", "later"), ("--top-k", 2), ("--form", "echo")):
        ended = made(served, data, tmp_path / "t.arrow", *more)
        assert (ended.code, "--overwrite" in ended.said) == (1, True), more


def test_other_weights_under_the_same_name_are_noticed(
    served: Served, data: Path, teacher_path: Path, tmp_path: Path
) -> None:
    served.changes = [lambda found: found] * 8
    served.always = lambda found: 503
    assert made(served, data, tmp_path / "t.arrow", "--concurrency", 1).code == 1
    served.always, own = None, served.model
    served.model = tiny.model(4).eval()
    ended = made(served, data, tmp_path / "t.arrow")
    assert (ended.code, "other weights" in ended.said, "--revision" in ended.said) == (1, True, True)
    served.model = own
    assert made(served, data, tmp_path / "t.arrow").code == 0


OPTIONS = {
    "--model": ("--endpoint", "http://localhost:1/v1", "--logprobs-column", "lp"),
    "--lora": ("--endpoint", "http://localhost:1/v1", "--model", "m", "--lora", "x"),
    "--dtype": ("--endpoint", "http://localhost:1/v1", "--model", "m", "--dtype", "bfloat16"),
    "--tokenizer": ("--model", "m", "--tokenizer", "t"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_do_not_go_together_are_refused(option: str, data: Path, tmp_path: Path) -> None:
    ended = call("teacher-logprobs", data, "--output", tmp_path / "t.arrow", *OPTIONS[option])
    assert (ended.code, option in ended.said) == (1, True)


def test_a_tokenizer_that_is_not_there_is_named(served: Served, data: Path, tmp_path: Path) -> None:
    ended = call("teacher-logprobs", data, "--output", tmp_path / "t.arrow", "--endpoint", served.url, "--model", "x/y")
    assert (ended.code, "--tokenizer" in ended.said) == (1, True)
