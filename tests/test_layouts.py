"""Same student, five layouts: however a conversation is written down, the same tokens are scored, to the same numbers.

Through real trainers and the command line, with a tokenizer that merges the header's newline with the response's.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch.utils.data
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from distill_sampler import BestOf, Curriculum, RankSurprisalRatio, Scorer, Shuffle, attach
from distill_sampler.sources.templates import conversation
from tests import tiny
from tests.cli.conftest import call, write_lines
from tests.test_attach import truncating

RSR = "rank_surprisal_ratio"
IDENTITY = ("prompt_id", "teacher")


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerBase:
    """Two newlines are one token: where a response begins with one, header and response run together."""
    return tiny.tokenizer(("Ċ", "Ċ"))


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny.model(vocab_size=tiny.VOCAB + 1)


def rows(num_prompts: int = 2) -> datasets.Dataset:
    """The toy candidates; every second response begins with a newline, and the last is of two turns."""
    made = tiny.candidates(num_prompts).to_list()
    for number, row in enumerate(made):
        row["completion"][0]["content"] = "\n" * (number % 2) + row["completion"][0]["content"]
    made[-1]["completion"] += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Quite sure 🎉"}]
    return datasets.Dataset.from_list(made)


# ---- The layouts ----


def as_prompt_completion(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    return {"prompt": row["prompt"], "completion": row["completion"]}


def as_messages(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    return {"messages": row["prompt"] + row["completion"]}


def as_text(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    return {"text": tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)}


def as_strings(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The rendered text in two columns, the assistant's header in the first."""
    text = as_text(row, tokenizer)["text"]
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    return {"prompt": prompt, "completion": text[len(prompt) :]}


def as_strings_with_header(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The rendered text in two columns, the assistant's header in the second."""
    text = as_text(row, tokenizer)["text"]
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False)
    return {"prompt": prompt, "completion": text[len(prompt) :]}


def as_tokens(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Tokenised by the user, with the first response's prompt masked and the user's later turns too."""
    written = conversation(row["prompt"] + row["completion"], 0, tokenizer)
    ids = tokenizer(written.text, add_special_tokens=False, return_offsets_mapping=True)
    inside = [any(b <= start and end <= e for b, e in written.responses) for start, end in ids["offset_mapping"]]
    labels = [token if kept else -100 for token, kept in zip(ids["input_ids"], inside, strict=True)]
    return {"input_ids": ids["input_ids"], "labels": labels}


def as_tokens_alone(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Tokenised ChatML, every token labelled."""
    ids = as_tokens(row, tokenizer)["input_ids"]
    return {"input_ids": ids, "labels": ids}


Layout = Callable[[dict[str, Any], Any], dict[str, Any]]
LAYOUTS: list[Layout] = [
    as_messages,
    as_prompt_completion,
    as_strings,
    as_strings_with_header,
    as_text,
    as_tokens,
    as_tokens_alone,
]


def laid_out(data: datasets.Dataset, layout: Layout, tokenizer: Any) -> list[dict[str, Any]]:
    return [{**layout(row, tokenizer), **{name: row[name] for name in IDENTITY}} for row in data.to_list()]


# ---- Through a trainer ----


def arguments(output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
    } | changes


def sft_trainer(output: Path, model: Any, tokenizer: Any, data: list[dict[str, Any]], **changes: Any) -> Any:
    args = SFTConfig(**arguments(output, gradient_checkpointing=False, **changes))
    train_dataset = datasets.Dataset.from_list(data)
    return SFTTrainer(model=model, processing_class=tokenizer, train_dataset=train_dataset, args=args)


def plain_trainer(output: Path, model: Any, tokenizer: Any, data: Any) -> Any:
    return Trainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer or tiny.tokenizer()),
        args=TrainingArguments(**arguments(output)),
    )


def attached(trainer: Any, **options: Any) -> Curriculum:
    curriculum = Curriculum(metrics=[RankSurprisalRatio()], policies=[Shuffle()], scorer=Scorer(progress=False))
    attach(trainer, curriculum, **options)
    return curriculum


def scored(curriculum: Curriculum) -> list[list[int]]:
    samples = curriculum.dataset.samples(range(len(curriculum.dataset)))
    return [sample.input_ids[sample.scored].tolist() for sample in samples]


def scores(curriculum: Curriculum, model: Any) -> Any:
    curriculum.start_epoch(0, model)
    return curriculum.store.latest[RSR]


def expected_tokens(data: datasets.Dataset, tokenizer: Any) -> list[list[int]]:
    """By hand: the contents, less a first newline that has become the header's."""
    return [
        [
            token
            for message in row["completion"]
            if message["role"] == "assistant"
            for token in tokenizer(message["content"].removeprefix("\n"))["input_ids"]
        ]
        for row in data
    ]


def test_every_layout_scores_the_same_tokens_in_a_trainer(
    tmp_path: Path, merging: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    found = {}
    for layout in LAYOUTS:
        curriculum = attached(sft_trainer(tmp_path, model, merging, laid_out(rows(), layout, merging)))
        assert scored(curriculum) == expected_tokens(rows(), merging), layout.__name__
        assert len(set(curriculum.dataset.prompt_hash.tolist())) == 2, layout.__name__
        found[layout.__name__] = scores(curriculum, model)
    for name, values in found.items():
        # SFTTrainer adds an EOS to text, so that rows are padded otherwise
        np.testing.assert_allclose(values, found["as_messages"], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("layout", "setting"),
    [
        (as_messages, "assistant_only_loss"),
        (as_prompt_completion, "assistant_only_loss"),
        (as_prompt_completion, "completion_only_loss"),
        (as_strings, "completion_only_loss"),
    ],
)
@pytest.mark.parametrize("value", [True, False])
def test_what_the_trainer_trains_on_beside_changes_nothing(
    value: bool,
    setting: str,
    layout: Layout,
    tmp_path: Path,
    merging: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> None:
    data = laid_out(rows(), layout, merging)
    assert scored(attached(sft_trainer(tmp_path, model, merging, data, **{setting: value}))) == expected_tokens(
        rows(), merging
    )


@pytest.mark.parametrize("kind", ["datasets.Dataset", "list", "torch"])
def test_tokens_that_are_all_labelled_are_told_apart_in_a_plain_trainer(
    kind: str, tmp_path: Path, merging: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    data: Any = laid_out(rows(), as_tokens_alone, merging)
    if kind == "datasets.Dataset":
        data = datasets.Dataset.from_list(data)
    elif kind == "torch":

        class Tensors(torch.utils.data.Dataset[Any]):
            def __len__(self) -> int:
                return len(data)

            def __getitem__(self, row: int) -> Any:
                return {name: torch.tensor(data[row][name]) for name in ("input_ids", "labels")}

    wrapped = Tensors() if kind == "torch" else data
    for labels in ("labels", None):
        trainer = plain_trainer(tmp_path, model, merging, wrapped)
        assert scored(attached(trainer, labels=labels)) == expected_tokens(rows(), merging)
        assert trainer.train_dataset is wrapped


@pytest.mark.parametrize("beside", [{}, {"messages": [{"role": "assistant", "content": "Other words"}]}], ids=str)
def test_labels_that_leave_tokens_out_are_taken_at_their_word(
    beside: dict[str, Any], tmp_path: Path, merging: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    """Two tokens behind each conversation, where no template would have a response."""
    data = [
        {"input_ids": [*row["input_ids"], 70, 71], "labels": [-100] * len(row["input_ids"]) + [70, 71], **beside}
        for row in laid_out(rows(), as_tokens_alone, merging)
    ]
    for make in (sft_trainer, lambda *parts: plain_trainer(*parts[:3], datasets.Dataset.from_list(parts[3]))):
        curriculum = attached(make(tmp_path, model, merging, data))
        assert scored(curriculum) == [[70, 71]] * len(data)


def test_what_is_not_trained_on_is_not_scored(
    tmp_path: Path, merging: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    """Tokenised by the user as the messages beside say, the first three tokens of each response masked."""
    data = laid_out(rows(), as_tokens, merging)
    for row, original in zip(data, rows(), strict=True):
        row["messages"] = original["prompt"] + original["completion"]
        begin = next(place for place, label in enumerate(row["labels"]) if label != -100)
        row["labels"][begin : begin + 3] = [-100] * 3
    expected = [tokens[3:] for tokens in expected_tokens(rows(), merging)]
    assert scored(attached(sft_trainer(tmp_path, model, merging, data))) == expected


def test_columns_that_do_not_give_the_rows_tokens_are_not_believed(
    tmp_path: Path, merging: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    """Tokenised by the user, otherwise than the column beside them says."""
    data = laid_out(rows(), as_tokens_alone, merging)
    for row in data:
        row["messages"] = [{"role": "user", "content": "Other"}, {"role": "assistant", "content": "words"}]
    curriculum = attached(sft_trainer(tmp_path, model, merging, data))
    assert scored(curriculum) == expected_tokens(rows(), merging)
    assert not curriculum.dataset.cut.any()


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated")
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("layout", [as_messages, as_strings, as_text])
def test_truncation_takes_away_tokens_and_nothing_else(
    layout: Layout, mode: str, tmp_path: Path, merging: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    data = laid_out(rows().select(range(5)), layout, merging)
    trainer = sft_trainer(tmp_path, model, merging, data, max_length=70, **truncating(mode))
    for found, whole in zip(scored(attached(trainer)), expected_tokens(rows(), merging), strict=False):
        # the first token of a row is never scored: nothing predicts it
        assert len(found) > 10
        assert found == (whole[: len(found)] if mode == "keep_start" else whole[len(whole) - len(found) :])


# ---- Text without markers ----


def unmarked() -> list[dict[str, Any]]:
    return [
        {
            "text": f"Q: {row['prompt'][0]['content']}\nA: {row['completion'][0]['content']}",
            **{n: row[n] for n in IDENTITY},
        }
        for row in tiny.candidates(2).to_list()
    ]


def test_text_without_markers_is_refused_with_the_cure(
    tmp_path: Path, merging: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    mixed = laid_out(rows(), as_text, merging)[:4] + unmarked()[4:]
    cure = r"messages.*prompt and completion.*-100.*score_whole_text=True"
    for data, first in ((unmarked(), "6 of 6 rows .first: row 0"), (mixed, "2 of 6 rows .first: row 4")):
        with pytest.raises(ValueError, match=rf"{first}.*'<\|im_start\|>assistant'.*{cure}"):
            attached(sft_trainer(tmp_path, model, merging, data))
    without = tiny.tokenizer(("Ċ", "Ċ"))
    without.chat_template = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=rf"no chat template.*{cure}"):
        attached(sft_trainer(tmp_path, model, without, unmarked()))
    tokens = datasets.Dataset.from_list(laid_out(rows(), as_tokens_alone, merging))
    with pytest.raises(ValueError, match=rf"processing_class=.*{cure}"):
        attached(plain_trainer(tmp_path, model, None, tokens))


def test_text_without_markers_is_scored_whole_on_request_and_said(
    tmp_path: Path, merging: PreTrainedTokenizerBase, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    mixed = laid_out(rows(), as_text, merging)[:4] + unmarked()[4:]
    curriculum = attached(sft_trainer(tmp_path, model, merging, mixed), score_whole_text=True)
    whole = [merging(row["text"])["input_ids"][1:] for row in mixed[4:]]
    assert scored(curriculum) == expected_tokens(rows(), merging)[:4] + whole
    (said,) = [record.getMessage() for record in caplog.records if "score_whole_text" in record.getMessage()]
    assert "2 of 6 rows (first: row 4) are scored whole" in said


# ---- Through the command line ----


@pytest.fixture
def student_path(tmp_path: Path, merging: PreTrainedTokenizerBase, model: PreTrainedModel) -> Path:
    model.save_pretrained(tmp_path / "student")
    merging.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def test_every_layout_gives_the_trainers_numbers_on_the_command_line(
    tmp_path: Path, student_path: Path, merging: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    in_training = scores(attached(sft_trainer(tmp_path, model, merging, laid_out(rows(), as_messages, merging))), model)
    for layout in LAYOUTS:
        data = write_lines(tmp_path / f"{layout.__name__}.jsonl", laid_out(rows(), layout, merging))
        output = tmp_path / f"{layout.__name__}.parquet"
        ended = call("score", data, "--model", student_path, "--output", output)
        assert ended.code == 0, ended.said
        table = pq.read_table(output)
        np.testing.assert_allclose(table[RSR].to_numpy(), in_training, rtol=1e-5, err_msg=layout.__name__)
        texts = ["".join(tokens) for tokens in table["tokens"].to_pylist()]
        assert texts == [merging.decode(tokens) for tokens in expected_tokens(rows(), merging)]
        applied = "Template: none is applied" not in ended.said
        assert applied == (layout in (as_messages, as_prompt_completion)), ended.said


def test_text_as_prompt_and_completion_is_the_one_difference_and_said(
    tmp_path: Path, student_path: Path, merging: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    data = [
        {"prompt": row["prompt"][0]["content"] + " ", "completion": row["completion"][0]["content"], "prompt_id": "p"}
        for row in tiny.candidates(2).to_list()
    ]
    path = write_lines(tmp_path / "data.jsonl", data)
    in_training = scores(attached(sft_trainer(tmp_path, model, merging, data)), model)
    for options, same, said in (
        (("--plain",), True, "Template: none is applied (--plain)."),
        ((), False, "SFTTrainer applies no template to a prompt and a completion that are text; --plain scores them"),
    ):
        ended = call("score", path, "--model", student_path, "--output", tmp_path / f"{same}.parquet", *options)
        assert ended.code == 0, ended.said
        assert said in ended.said
        found = pq.read_table(tmp_path / f"{same}.parquet")[RSR].to_numpy()
        assert np.allclose(found, in_training, rtol=1e-5) == same


def test_text_without_markers_is_refused_on_the_command_line_or_scored_whole(
    tmp_path: Path, student_path: Path, merging: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    path = write_lines(tmp_path / "data.jsonl", unmarked())
    output = tmp_path / "scores.parquet"
    ended = call("score", path, "--model", student_path, "--output", output)
    assert (ended.code, "line 1" in ended.said, "--whole-text" in ended.said) == (1, True, True), ended.said
    assert "--chat-template" in ended.said
    ended = call("score", path, "--model", student_path, "--output", output, "--whole-text", "--overwrite")
    assert ended.code == 0, ended.said
    assert "texts scored whole, prompt included, because of --whole-text: 6." in ended.said
    curriculum = attached(sft_trainer(tmp_path, model, merging, unmarked()), score_whole_text=True)
    table = pq.read_table(output)
    assert table["num_tokens"].to_pylist() == [len(tokens) for tokens in scored(curriculum)]
    np.testing.assert_allclose(table[RSR].to_numpy(), scores(curriculum, model), rtol=1e-5)
    # and without the option, those scores are another matter
    ended = call("score", path, "--model", student_path, "--output", output)
    assert (ended.code, "was made with whole_text = True" in ended.said) == (1, True), ended.said


def test_what_is_chosen_of_text_is_written_as_text(
    tmp_path: Path, student_path: Path, merging: PreTrainedTokenizerBase
) -> None:
    data = laid_out(rows(), as_text, merging)
    path, output = write_lines(tmp_path / "data.jsonl", data), tmp_path / "scores.parquet"
    ended = call("score", path, "--model", student_path, "--output", output)
    assert ended.code == 0, ended.said
    chosen = tmp_path / "train.jsonl"
    ended = call("select", output, "--policy", f"BestOf({RSR}, per=prompt_id)", "--output", chosen)
    assert ended.code == 0, ended.said
    lines = [json.loads(line) for line in chosen.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 2
    assert {line["text"] for line in lines} <= {row["text"] for row in data}
    assert not {"prompt", "completion", "messages"} & set(lines[0])


def test_texts_without_a_group_column_are_groups_of_their_own_and_said(
    tmp_path: Path, student_path: Path, merging: PreTrainedTokenizerBase
) -> None:
    data = [{"text": row["text"]} for row in laid_out(rows(), as_text, merging)]
    path, output = write_lines(tmp_path / "data.jsonl", data), tmp_path / "scores.parquet"
    ended = call("score", path, "--model", student_path, "--output", output)
    assert ended.code == 0, ended.said
    assert "Each text is a group of its own" in ended.said
    assert "--group-column" in ended.said
    assert len(set(pq.read_table(output)["prompt_id"].to_pylist())) == len(data)


def test_rows_that_change_their_way_of_writing_are_counted(
    tmp_path: Path, student_path: Path, merging: PreTrainedTokenizerBase
) -> None:
    plain = [{"prompt": "1 + 3?", "completion": "4", "prompt_id": "p"}]
    data = plain + [{**row, "teacher": None} for row in laid_out(rows(), as_strings, merging)[:2]]
    path = write_lines(tmp_path / "data.jsonl", data)
    ended = call("score", path, "--model", student_path, "--output", tmp_path / "scores.parquet")
    assert ended.code == 0, ended.said
    assert "wrapped again, unlike the first: 2." in ended.said


# ---- The real student ----


def test_every_layout_scores_the_same_tokens_of_the_real_student(
    tmp_path: Path, student: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    model, tokenizer = student
    # of the first one's two newlines, one runs together with the header
    answers = ("\n\n4, because\n    1 + 3 == 4", "It is 4 🎉.")
    data = datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "What is 1 + 3?"}],
                "completion": [{"role": "assistant", "content": answer}],
                "prompt_id": "sum",
                "teacher": teacher,
            }
            for answer, teacher in zip(answers, tiny.TEACHERS, strict=False)
        ]
    )
    found = {}
    for layout in LAYOUTS:
        curriculum = attached(sft_trainer(tmp_path, model, tokenizer, laid_out(data, layout, tokenizer)))
        assert [tokenizer.decode(tokens) for tokens in scored(curriculum)] == [
            answers[0].removeprefix("\n"),
            answers[1],
        ], layout.__name__
        found[layout.__name__] = scores(curriculum, model)
    for name, values in found.items():
        np.testing.assert_allclose(values, found["as_messages"], rtol=1e-4, err_msg=name)


def test_a_trainer_that_cuts_responses_says_whose_and_prefers_whole_ones(
    tmp_path: Path, merging: PreTrainedTokenizerBase
) -> None:
    data = datasets.Dataset.from_list(tiny.candidates(4).to_list())
    trainer = sft_trainer(tmp_path, tiny.model(vocab_size=tiny.VOCAB + 1), merging, data, max_length=80)
    curriculum = Curriculum(
        metrics=[RankSurprisalRatio()],
        policies=[BestOf(RSR, per="prompt_id")],
        scorer=Scorer(progress=False),
    )
    attach(trainer, curriculum)
    cut = curriculum.dataset.cut
    assert cut.tolist() == [teacher == "cy" for teacher in trainer.train_dataset["teacher"]]
    curriculum.start_epoch(0, trainer.model)
    (note,) = (note for note in curriculum.summaries[0].notes if "cut off" in note)
    assert "4 of 12 responses" in note
    assert "cy: 4 of 4" in note
    assert "max_length" in note
    assert not cut[curriculum.plans[0].indices].any()
    best = [int(np.argmin(curriculum.store.latest[RSR][group : group + 3])) for group in range(0, 12, 3)]
    if 2 in best:  # the cut one would have won somewhere
        assert "its response was cut off by truncation" in curriculum.explain(3 * best.index(2) + 2, 0)
