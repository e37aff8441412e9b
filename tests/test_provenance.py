"""What two models make of each sentence, against a reference; the paper's classes, curves and metrics by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from distill_sampler import (
    BestOf,
    Curriculum,
    ExcessLoss,
    Metric,
    ModelReader,
    Provenance,
    Rho1Share,
    ScoredDataset,
    Scorer,
    TeacherSentences,
    TeacherStudentGap,
    attach,
)
from distill_sampler.engines.token_bytes import tokens_of
from distill_sampler.metrics.provenance import CLASSES, area_between, class_curves, class_shares, sensitivity
from distill_sampler.metrics.spans import (
    SentenceLogProbs,
    common_sentences,
    log_probs_of_sentences,
    sentence_starts,
    text_and_begins,
)
from distill_sampler.metrics.steps import sentences
from distill_sampler.protocols import PassInfo
from distill_sampler.types import Sample
from tests import tiny

BETA = 0.001
"""Random models find nothing probable."""
MERGED = [("i", "s"), ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), (".", "Ġ"), ("Ċ", "Ċ"), ("Ã", "©"), ("is", "Ġ")]
"""What the teacher's tokenizer merges; `. ` straddles the border between two sentences."""
ANSWERS = (
    "The sum is 3. Let us check it: 1 + 2 is 3.\n\nSo the café is open… This is the end!",
    "Why? Because the é is here. é! é. Yes",
    "No end",
    "A. B. C is the one.\nDone。 没有 问题。 the end",
)


def teacher_tokenizer() -> PreTrainedTokenizerBase:
    return tiny.tokenizer(*MERGED)


def bytes_of(token: int, tokenizer: PreTrainedTokenizerBase) -> bytes:
    """The bytes that a token of a byte-level tokenizer stands for."""
    text = tokenizer.convert_ids_to_tokens(token)
    if text in tokenizer.all_special_tokens:
        return text.encode()
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes the other bytes as characters from 256
    hidden = [byte for byte in range(256) if byte not in shown]
    byte = {chr(each): each for each in shown} | {chr(256 + place): each for place, each in enumerate(hidden)}
    return bytes(byte[character] for character in text)


@torch.no_grad()
def reference(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: Sequence[int],
    response: Sequence[int],
    starts: Sequence[int],
) -> tuple[list[float], list[int]]:
    """The log-probability of each sentence and its number of tokens, with one forward for each sentence."""
    model = model.double()
    begins = np.cumsum([0, *(len(bytes_of(token, tokenizer)) for token in response)])[:-1]
    sums, counts = [], []
    for start, stop in zip(starts, [*starts[1:], np.inf], strict=True):
        own = [place for place, begin in enumerate(begins) if start <= begin < stop]
        ids = torch.tensor([[*context, *response[: own[-1] + 1]]])
        log_probs = torch.log_softmax(model(ids).logits[0], -1)
        at = [len(context) + place for place in own]
        sums.append(sum(float(log_probs[place - 1, ids[0, place]]) for place in at))
        counts.append(len(own))
    return sums, counts


def sample_of(answer: str, tokenizer: PreTrainedTokenizerBase, index: int = 0) -> Sample:
    prompt = tokenizer("<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    response = tokenizer(answer)["input_ids"]
    return Sample(
        index=index,
        input_ids=np.array([*prompt, *response, 257]),
        scored=np.array([False] * len(prompt) + [True] * len(response) + [False]),
        columns={"prompt": [{"role": "user", "content": "What is 1 + 2?"}]},
    )


def read(metric: Any, sample: Sample, student: PreTrainedModel) -> list[Any]:
    """What the readers make of a metric's views of a sample."""
    stats = []
    for view in metric.views(sample):
        reader = ModelReader(student) if view.reader == "student" else metric.readers[view.reader]
        with reader.open(PassInfo(tokens=100)) as opened:
            stats += opened([view])
    return stats


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("prompt", [None, "prompt"])
def test_each_sentence_has_the_log_probability_of_a_forward_of_its_own(
    answer: str, prompt: str | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    student, teacher, theirs = tiny.model(), tiny.model(1, vocab_size=300), teacher_tokenizer()
    theirs.chat_template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %} >> "
    metric = TeacherStudentGap(teacher=ModelReader(teacher, tokenizer=theirs), tokenizer=tokenizer, prompt=prompt)
    sample = sample_of(answer, tokenizer)
    found = metric.by_sentence(sample, read(metric, sample, student))
    starts = np.r_[0, np.cumsum(found[0].num_bytes)[:-1]].tolist()

    context = sample.input_ids[: int(sample.scored.argmax())].tolist()
    written = theirs("[What is 1 + 2?] >> " if prompt else tokenizer.decode(context))["input_ids"]
    for of_model, model, own, before in (
        (found[0], teacher, theirs, written),
        (found[1], student, tokenizer, context),
    ):
        sums, counts = reference(model, own, before, own(answer)["input_ids"], starts)
        assert of_model.log_prob == pytest.approx(sums, abs=1e-4 * max(counts))
        assert of_model.log_prob / of_model.tokens == pytest.approx(np.array(sums) / counts, abs=1e-4)
        assert of_model.tokens.tolist() == counts
    assert found[0].num_bytes.sum() == len(answer.encode())


def test_a_sentence_whose_text_lies_in_the_token_before_it_is_joined(tokenizer: PreTrainedTokenizerBase) -> None:
    theirs = tiny.tokenizer(("B", "."), ("Ġ", "B."), ("Ġ", "ĠB."), (".", "ĠB."))  # `. B.` is one token
    text = "Is it A. B. See"
    starts = sentence_starts(text, sentences)
    assert [text[start:] for start in starts] == ["Is it A. B. See"]  # initials do not end a sentence
    starts = np.array([0, 8, 11])
    _, begins = tokens_of(text, theirs)
    _, own = tokens_of(text, tokenizer)
    assert common_sentences(starts, own).tolist() == [0, 8, 11]
    assert common_sentences(starts, own, begins).tolist() == [0, 11]
    assert common_sentences(starts, begins[begins > 7]).tolist() == [0]  # the first sentences, with the one after them


def test_bytes_are_counted_not_characters() -> None:
    text = "é. 没有。 Yes"
    assert [text.encode()[start:].decode() for start in sentence_starts(text, sentences)] == [
        "é. 没有。 Yes",
        " 没有。 Yes",
        " Yes",
    ]


def test_tokens_begin_where_their_text_does_in_every_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ANSWERS:
        for own in (tokenizer, teacher_tokenizer()):
            input_ids, begins = tokens_of(text, own)
            assert text_and_begins(input_ids, own)[0] == text
            exact = np.cumsum([0, *(len(bytes_of(token, own)) for token in input_ids.tolist())])[:-1]
            characters = np.cumsum([0, *(len(each.encode()) for each in text)])
            assert begins.tolist() == exact.tolist()
            assert text_and_begins(input_ids, own)[1].tolist() == exact.tolist()
            unknown = SimpleNamespace(decode=own.decode, batch_decode=own.batch_decode)  # whose bytes are not known
            of_characters = [int(characters[characters <= byte].max()) for byte in exact]
            assert text_and_begins(input_ids, unknown)[1].tolist() == of_characters
    cut = tokens_of("é!", tokenizer)[0][:1]
    assert text_and_begins(cut, tokenizer)[0] == "\ufffd"


def log_probs(total: Sequence[float], tokens: Sequence[int], num_bytes: Sequence[int]) -> SentenceLogProbs:
    return SentenceLogProbs(log_prob=np.array(total), tokens=np.array(tokens), num_bytes=np.array(num_bytes))


def test_a_tokenizer_with_more_tokens_is_favoured_unless_bytes_are_counted() -> None:
    for tokens, expected in ((16, 0.47), (20, 0.55), (25, 0.62)):
        sentence = log_probs([-12.0], [tokens], [80])
        assert sentence.probability()[0] == pytest.approx(expected, abs=0.005)
        assert sentence.probability(bytes_per_token=4)[0] == pytest.approx(np.exp(-12 / 20))


def of_probabilities(*values: float) -> SentenceLogProbs:
    return log_probs(np.log(values).tolist(), [1] * len(values), [4] * len(values))


def test_classes_are_tested_in_the_papers_order() -> None:
    cases = {
        (0.50, 0.45, 0.42): "shared",
        (0.70, 0.50, 0.70): "teacher",
        (0.70, 0.50, 0.20): "teacher",  # whatever the distilled model says
        (0.30, 0.50, 0.35): "student",
        (0.50, 0.45, 0.80): "boosted",  # only the distilled model differs
        (0.50, 0.45, 0.10): "boosted",
    }
    found = Provenance().classes(*(of_probabilities(*column) for column in zip(*cases, strict=True)))
    assert [CLASSES[each] for each in found] == list(cases.values())
    wide = Provenance(alpha=0.3).classes(*(of_probabilities(*column) for column in zip(*cases, strict=True)))
    assert [CLASSES[each] for each in wide] == ["shared", "shared", "teacher", "shared", "boosted", "boosted"]


@pytest.mark.parametrize("shift", [1e-6, -1e-6])
def test_a_difference_counts_only_beyond_the_threshold(shift: float) -> None:
    found = Provenance(beta=0.25).is_teacher(of_probabilities(0.75 + shift), of_probabilities(0.5))
    assert found.tolist() == [shift > 0]


def test_sensitivity_is_the_shares_for_several_thresholds() -> None:
    response = tuple(of_probabilities(*column) for column in zip((0.58, 0.5, 0.5), (0.7, 0.5, 0.5), strict=True))
    table = sensitivity([response], Provenance())
    assert {value: shares.tolist() for value, shares in table.items()} == {
        0.05: [0, 1, 0, 0],
        0.1: [0.5, 0.5, 0, 0],
        0.15: [0.5, 0.5, 0, 0],
    }


def test_curves_weigh_responses_equally_and_sentences_by_their_place() -> None:
    short, long = np.array([0, 1]), np.array([1] * 8)
    curves = class_curves([short, long], bins=4)
    assert curves[:, 0].tolist() == [0.5, 0.5, 0, 0]
    assert curves[:, 1].tolist() == [0.5, 0.5, 1, 1]
    assert curves.sum(axis=1) == pytest.approx(np.ones(4))
    third = class_curves([np.array([2, 3, 3])], bins=2)  # a border within a bin is shared
    assert third[:, 2] == pytest.approx([2 / 3, 0])
    assert np.isnan(class_curves([])).all()
    assert class_shares([short, long]).tolist() == [0.1, 0.9, 0, 0]


def test_the_area_between_curves_is_of_their_absolute_difference() -> None:
    one, other = np.array([[0.5], [0.1]]), np.array([[0.1], [0.5]])
    area, signed = area_between(one, other)
    assert area == pytest.approx([0.4])
    assert signed == pytest.approx([0.0])


@pytest.fixture(scope="module")
def several_sentences(tokenizer: PreTrainedTokenizerBase) -> ScoredDataset:
    samples = [sample_of(answer, tokenizer) for answer in ANSWERS]
    rows = [{"input_ids": each.input_ids, "labels": np.where(each.scored, each.input_ids, -100)} for each in samples]
    return ScoredDataset(rows, end_token_ids=[257])


def scores_of(metrics: list[Any], dataset: ScoredDataset, student: PreTrainedModel) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    for block in Scorer(progress=False).score(student, dataset, metrics, np.arange(len(dataset))):
        for name, values in block.columns.items():
            columns.setdefault(name, np.zeros(len(dataset)))[block.indices] = values
    return columns


def test_metrics_are_their_formulas_over_the_sentences(
    several_sentences: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    dataset = several_sentences
    student = tiny.model()
    teacher = ModelReader(tiny.model(1, vocab_size=300), tokenizer=teacher_tokenizer())
    given = {"teacher": teacher, "tokenizer": tokenizer}
    metrics = [
        TeacherSentences(**given, beta=BETA),
        TeacherSentences(**given, beta=BETA, by="share", name="ts_share"),
        TeacherSentences(**given, beta=BETA, first_bytes=20, name="ts_first"),
        TeacherStudentGap(**given),
        ExcessLoss(reference=teacher, tokenizer=tokenizer),
    ]
    found = scores_of(metrics, dataset, student)
    assert 0 < found["teacher_sentences"].sum() < found["num_sentences"].sum()
    assert found["teacher_label_flips"].any()
    for row in range(len(dataset)):
        sample = dataset.sample(row)
        stats = read(metrics[0], sample, student)
        of_teacher, of_student = metrics[0].by_sentence(sample, stats)
        gap = of_teacher.probability() - of_student.probability()
        per_byte = of_teacher.probability(4) - of_student.probability(4)
        flips = int(((gap > BETA) != (per_byte > BETA)).sum())
        assert found["teacher_sentences"][row] == (gap > BETA).sum()
        assert found["teacher_share"][row] == pytest.approx((gap > BETA).mean())
        assert found["num_sentences"][row] == len(gap)
        assert found["teacher_label_flips"][row] == flips
        assert found["ts_share"][row] == pytest.approx((gap > BETA).mean())
        begins = np.r_[0, np.cumsum(of_teacher.num_bytes)[:-1]]
        assert found["ts_first"][row] == (gap > BETA)[begins < 20].sum()
        assert found["teacher_student_gap"][row] == pytest.approx(gap.mean(), abs=1e-5)
        losses = [float(each.surprisal.sum()) for each in stats]
        tokens = len(stats[0].surprisal)
        assert found["excess_loss"][row] == pytest.approx((losses[0] - losses[1]) / tokens, abs=1e-4)
        assert found["reference_loss"][row] == pytest.approx(losses[1] / tokens, abs=1e-4)


def test_a_teacher_that_is_the_student_has_no_sentence_of_its_own(
    dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    for teacher in (ModelReader(tiny.model()), ModelReader(tiny.model(), tokenizer=tiny.tokenizer())):
        given = {"teacher": teacher, "tokenizer": tokenizer}
        found = scores_of(
            [TeacherSentences(**given, beta=1e-4), ExcessLoss(reference=teacher, tokenizer=tokenizer)],
            dataset,
            tiny.model(),
        )
        assert found["teacher_sentences"].tolist() == [0] * len(dataset)
        assert np.abs(found["excess_loss"]).max() < 1e-5


def test_turns_of_a_conversation_are_read_in_their_order(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "u: Hi|Hello. I am here|u: Sum?|It is 3. Yes"
    parts = text.split("|")
    ids = [tokenizer(part)["input_ids"] for part in parts]
    scored = [[bool(place % 2)] * len(part) for place, part in enumerate(ids)]
    sample = Sample(index=0, input_ids=np.concatenate(ids), scored=np.concatenate(scored))
    student, theirs = tiny.model(), teacher_tokenizer()
    teacher = tiny.model(1, vocab_size=300)
    metric = TeacherSentences(teacher=ModelReader(teacher, tokenizer=theirs), tokenizer=tokenizer)
    of_teacher, _ = metric.by_sentence(sample, read(metric, sample, student))
    assert of_teacher.num_bytes.tolist() == [6, 10, 8, 4]  # a turn begins a sentence
    context = [token for part in parts[:3] for token in theirs(part)["input_ids"]]
    sums, _ = reference(teacher, theirs, context, theirs(parts[3])["input_ids"], [0, 8])
    assert of_teacher.log_prob[2:] == pytest.approx(sums, abs=1e-3)


def test_log_probabilities_of_sentences_are_sums_over_their_tokens() -> None:
    found = log_probs_of_sentences(
        np.array([0, 4]), 9, np.array([0, 2, 3, 5]), np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    )
    assert found.log_prob.tolist() == [-6, -4]
    assert found.tokens.tolist() == [3, 1]
    assert found.num_bytes.tolist() == [4, 5]


def test_in_the_trainer_each_epoch_takes_the_response_with_most_teacher_sentences_for_the_student_as_it_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {number} + 2?"}],
            "completion": [{"role": "assistant", "content": answer}],
            "prompt_id": number,
        }
        for number in range(2)
        for answer in ANSWERS
    ]
    teacher = ModelReader(tiny.model(1, vocab_size=300), tokenizer=teacher_tokenizer())
    curriculum = Curriculum(
        metrics=[TeacherSentences(teacher=teacher, beta=BETA, prompt="prompt")],
        policies=[BestOf("teacher_sentences", per="prompt_id")],
        scorer=Scorer(progress=False),
    )
    trainer = SFTTrainer(
        model=tiny.model(),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
        args=SFTConfig(
            output_dir=str(tmp_path),
            num_train_epochs=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
    )
    attach(trainer, curriculum)
    trainer.train()
    first, second = (scoring_pass.columns["teacher_sentences"] for scoring_pass in curriculum.cycle.record.passes)
    fresh = TeacherSentences(teacher=teacher, beta=BETA, prompt="prompt", tokenizer=tokenizer)
    dataset = ScoredDataset(trainer.train_dataset, end_token_ids=[257])
    assert first.tolist() == scores_of([fresh], dataset, tiny.model())["teacher_sentences"].tolist()
    for scores, plan in zip((first, second), curriculum.plans, strict=True):
        best = [scores[start : start + len(ANSWERS)].max() for start in (0, len(ANSWERS))]
        assert scores[plan.indices].tolist() == best
    assert first.tolist() != second.tolist()


def other_than_the_student_s(kind: type[Metric], vocab_size: int) -> Metric:
    teacher = ModelReader(tiny.model(1, vocab_size=vocab_size, **NO_SPECIALS))
    argument = "reference" if kind in (ExcessLoss, Rho1Share) else "teacher"
    return kind(**{argument: teacher})


NO_SPECIALS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
WITH_TEACHER = [TeacherSentences, TeacherStudentGap, ExcessLoss, Rho1Share]


@pytest.mark.parametrize("kind", WITH_TEACHER)
@pytest.mark.parametrize("vocab_size", [200, 2000], ids=["smaller", "larger"])
def test_a_teacher_of_another_vocabulary_and_no_tokenizer_is_refused(
    kind: type[Metric], vocab_size: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    metric = other_than_the_student_s(kind, vocab_size)
    argument = next(iter(metric.readers))
    with pytest.raises(ValueError, match=rf"{kind.__name__}\({argument}=\).*{vocab_size}.*tokenizer="):
        metric.with_tokenizer(tokenizer)


@pytest.mark.parametrize("kind", WITH_TEACHER)
def test_a_padded_vocabulary_is_the_student_s(
    kind: type[Metric], dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    padded = other_than_the_student_s(kind, tiny.VOCAB + 126).with_tokenizer(tokenizer)
    assert np.isfinite(scores_of([padded], dataset, tiny.model())[padded.name]).all()


def test_without_any_tokenizer_the_tokens_themselves_tell(dataset: ScoredDataset) -> None:
    """Losses of whole responses need no text, so no tokenizer may be known."""
    with pytest.raises(ValueError, match=r"ExcessLoss\(reference=\).*tokenizer="):
        scores_of([other_than_the_student_s(ExcessLoss, 100)], dataset, tiny.model())
