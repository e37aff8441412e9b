"""Two real processes under `accelerate launch`, on a CPU: the same scores, plans and order as one process has."""

import functools
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from distill_sampler import score_rows
from tests import tiny
from tests.distributed.launcher import launch

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "accelerate_configs"
WAYS = {
    "ddp": (CONFIGS / "cpu.yaml", "MULTI_CPU", "DistributedDataParallel", 1e-5),
    "zero1": (HERE / "cpu_zero1.yaml", "DEEPSPEED", "DeepSpeedEngine", 1e-4),
    "zero2": (CONFIGS / "cpu_zero2.yaml", "DEEPSPEED", "DeepSpeedEngine", 1e-4),
    "zero3": (CONFIGS / "cpu_zero3.yaml", "DEEPSPEED", "DeepSpeedEngine", 1e-4),
    "fsdp2": (HERE / "cpu_fsdp2.yaml", "FSDP", "FSDPLlamaForCausalLM", 1e-4),
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and candidates on disk. Eight prompts: an epoch is two whole batches of four."""
    folder = tmp_path_factory.mktemp("launch")
    tiny.model().save_pretrained(folder / "student")
    tiny.tokenizer().save_pretrained(folder / "student")
    with open(folder / "candidates.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in tiny.candidates(8))
    return folder


def sft_run(
    stage: Path, name: str, config: Path | None, *options: str, candidates: str = "candidates.jsonl", **how: Any
) -> subprocess.CompletedProcess[str]:
    paths = str(stage / "student"), str(stage / candidates), str(stage / name)
    return launch(HERE / "sft_run.py", *paths, *options, cwd=stage, config=config, **how)


def reports(
    stage: Path, name: str, config: Path | None, *options: str, candidates: str = "candidates.jsonl", **how: Any
) -> list[dict[str, Any]]:
    done = sft_run(stage, name, config, *options, candidates=candidates, **how)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(path.read_text()) for path in sorted((stage / name).glob("rank-*.json"))]


@functools.cache
def alone(stage: Path) -> dict[str, Any]:
    """The run of one process, with the same global batch."""
    (report,) = reports(stage, "alone", None, "--batch-size", "4")
    return report


@functools.cache
def alone_with_teacher(stage: Path) -> dict[str, Any]:
    """The same with objectives."""
    (report,) = reports(stage, "alone-teacher", None, "--batch-size", "4", "--objectives")
    return report


def work(report: dict[str, Any]) -> int:
    """How many batches a process read, without the probe's and those that only take part in the others' forwards."""
    return sum(shape not in ([1, 2], [3, 4]) for shape in report["shapes"])


def trained(of_ranks: list[dict[str, Any]]) -> list[list[int]]:
    """Samples of each global batch: the batch of rank 0, then that of rank 1."""
    index = {tuple(row): place for place, row in enumerate(of_ranks[0]["rows"])}
    steps = zip(*(report["batches"] for report in of_ranks), strict=True)
    return [[index[tuple(row)] for batch in step for row in batch] for step in steps]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_score_plan_train_and_resume_as_one_does(way: str, stage: Path) -> None:
    config, distributed_type, wrapper, tolerance = WAYS[way]
    if distributed_type == "DEEPSPEED":
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    both = reports(stage, way, config)
    for report in both:
        assert report["world_size"] == 2
        assert report["distributed_type"].endswith(distributed_type)
        assert report["wrapper"] == wrapper
        assert report["plans"] == both[0]["plans"]
    one = alone(stage)
    np.testing.assert_allclose(both[0]["scores"][0], one["scores"][0], rtol=tolerance)
    np.testing.assert_allclose(both[0]["scores"][1], one["scores"][1], rtol=1e-3)  # of a student trained meanwhile
    assert both[0]["scores"] == both[1]["scores"]
    assert both[0]["plans"] == one["plans"]
    assert trained(both) == trained([one])
    np.testing.assert_allclose(both[0]["losses"], one["losses"], rtol=1e-3)

    rest = reports(stage, f"{way}-resumed", config, "--resume", str(stage / way / "checkpoint-1"))
    assert trained(rest) == trained([one])[1:]
    np.testing.assert_allclose(rest[0]["losses"][-3:], one["losses"][-3:], rtol=1e-3)


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "zero3"])
def test_two_processes_take_their_first_scores_from_a_file(way: str, stage: Path) -> None:
    file, config = stage / "scores.parquet", WAYS[way][0]
    table = score_rows(stage / "student", tiny.candidates(8), metrics="RankSurprisalRatio", progress=False)
    pq.write_table(table, file)
    if way == "zero3":
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
        refused = sft_run(stage, f"given-{way}", config, "--scores", str(file))
        assert refused.returncode != 0
        assert "scores=: DeepSpeed's ZeRO-3" in refused.stderr
        return
    both = reports(stage, f"given-{way}", config, "--scores", str(file))
    assert both[0]["scores"][0] == both[1]["scores"][0] == table["rank_surprisal_ratio"].to_pylist()
    rows_read = [sum(rows for rows, _ in report["shapes"]) for report in (*both, alone(stage))]
    assert rows_read[0] + rows_read[1] < rows_read[2], (rows_read, "only the second pass reads")
    assert both[0]["plans"] == both[1]["plans"] == alone(stage)["plans"]
    assert trained(both) == trained([alone(stage)])


def test_two_processes_train_the_same_whole_steps_as_one(stage: Path) -> None:
    """Seven prompts in steps of four: the last step of each epoch is completed from its plan's start."""
    both = reports(stage, "seven", WAYS["ddp"][0], "--rows", "21")
    (one,) = reports(stage, "seven-alone", None, "--rows", "21", "--batch-size", "4")
    assert [len(plan) for plan in one["plans"]] == [7, 7]
    assert trained(both) == trained([one])
    assert trained([one]) == [step for plan in one["plans"] for step in (plan[:4], [*plan[4:], plan[0]])]
    np.testing.assert_allclose(both[0]["losses"], one["losses"], rtol=1e-3)


@functools.cache
def alone_with_packs(stage: Path, size: int, *options: str) -> dict[str, Any]:
    """The run of one process, with `size` packs in a batch."""
    name = "".join(("packs-alone", str(size), *options))
    (report,) = reports(stage, name, None, *PACKS, "--batch-size", str(size), *options)
    return report


PACKS = ("--pack-to", "160")


@pytest.mark.parametrize(
    ("way", "processes", "options"),
    [
        ("ddp", 2, []),
        ("ddp", 3, ["--objectives"]),
        ("zero2", 2, ["--objectives", "--lora"]),
        ("zero3", 2, ["--objectives", "--sharded-teacher"]),
        ("fsdp2", 2, ["--objectives"]),
    ],
)
def test_several_processes_train_the_same_packs_as_one(
    way: str, processes: int, options: list[str], stage: Path
) -> None:
    config, distributed_type, *_ = WAYS[way]
    if distributed_type == "DEEPSPEED":
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    name = f"packs-{way}-{processes}"
    all_of = reports(stage, name, config, *PACKS, "--batch-size", "1", *options, processes=processes)
    one = alone_with_packs(stage, processes, *(option for option in options if option != "--sharded-teacher"))
    assert len(all_of) == processes
    assert all(report["plans"] == one["plans"] for report in all_of)
    assert trained(all_of) == trained([one])
    np.testing.assert_allclose(all_of[0]["losses"], one["losses"], rtol=1e-3)
    np.testing.assert_allclose(all_of[0]["objectives"], one["objectives"], rtol=2e-3)
    assert len(one["objectives"]) == (len(one["losses"]) if "--objectives" in options else 0)


@pytest.mark.parametrize(("size", "steps"), [(1, (2, 4)), (3, (1, 2))])
def test_two_processes_continue_with_other_batches_what_one_began(
    size: int, steps: tuple[int, int], stage: Path
) -> None:
    """Steps of four until the first checkpoint, then of two and of six samples."""
    one = alone(stage)
    both = reports(
        stage, f"size-{size}", WAYS["ddp"][0], "--batch-size", str(size), "--resume", str(stage / "alone/checkpoint-1")
    )
    planned, second = both[0]["plans"]  # the first from the record beside the checkpoint
    assert planned == one["plans"][0]
    filled = [[*one["plans"][0][4:], *one["plans"][0]], [*second, *second]]
    expected = [
        rest[2 * size * n : 2 * size * (n + 1)] for rest, of in zip(filled, steps, strict=True) for n in range(of)
    ]
    assert trained(both) == expected
    assert both[0]["plans"] == both[1]["plans"]


@pytest.mark.parametrize("options", [["--lora"], ["--checkpointing"]])
def test_a_sharded_student_with_an_adapter_or_checkpointing_scores_as_one_process_does(
    options: list[str], stage: Path
) -> None:
    pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    name = options[0].strip("-")
    both = reports(stage, f"zero3-{name}", WAYS["zero3"][0], *options)
    (one,) = reports(stage, f"alone-{name}", None, "--batch-size", "4", *options)
    np.testing.assert_allclose(both[0]["scores"][0], one["scores"][0], rtol=1e-4)
    assert trained(both) == trained([one])


@pytest.mark.parametrize("way", ["ddp", "zero3", "fsdp2"])
def test_two_processes_observe_weigh_and_plan_anew_as_one_does(way: str, stage: Path) -> None:
    config, distributed_type, *_ = WAYS[way]
    if distributed_type == "DEEPSPEED":
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    both = reports(stage, f"{way}-online", config, "--online")
    (one,) = reports(stage, f"alone-online-{way}", None, "--batch-size", "4", "--online")
    assert both[0]["plans"] == both[1]["plans"] == one["plans"]
    assert len(one["plans"]) == 4  # two epochs of four steps, each planned anew after its first
    assert trained(both) == trained([one])
    for name in ("measured at", "times scored"):
        assert both[0][name] == both[1][name] == one[name]
    np.testing.assert_allclose(both[0]["latest"], one["latest"], rtol=1e-3)
    np.testing.assert_allclose(both[0]["losses"], one["losses"], rtol=1e-3)
    assert len(set(one["measured at"])) > 3

    rest = reports(
        stage, f"{way}-online-resumed", config, "--online", "--resume", str(stage / f"{way}-online" / "checkpoint-3")
    )
    assert trained(rest) == trained([one])[3:]
    assert rest[0]["times scored"] == one["times scored"]


@pytest.mark.parametrize("way", ["zero3", "fsdp2"])
def test_two_processes_learn_from_a_sharded_teacher_as_one_does(way: str, stage: Path) -> None:
    config, distributed_type, *_ = WAYS[way]
    if distributed_type == "DEEPSPEED":
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    both = reports(stage, f"{way}-sharded-teacher", config, "--objectives", "--sharded-teacher")
    one = alone_with_teacher(stage)
    assert both[0]["teacher is sharded"]
    assert not one["teacher is sharded"]
    assert trained(both) == trained([one])
    np.testing.assert_allclose(both[0]["losses"], one["losses"], rtol=1e-3)
    np.testing.assert_allclose(both[0]["objectives"], one["objectives"], rtol=2e-3)


@pytest.mark.parametrize("way", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_processes_learn_from_a_teacher_as_one_does(way: str, stage: Path) -> None:
    config, distributed_type, *_ = WAYS[way]
    if distributed_type == "DEEPSPEED":
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    both = reports(stage, f"{way}-teacher", config, "--objectives")
    one = alone_with_teacher(stage)
    assert trained(both) == trained([one])
    np.testing.assert_allclose(both[0]["losses"], one["losses"], rtol=1e-3)
    assert len(one["objectives"]) == 4
    np.testing.assert_allclose(both[0]["objectives"], one["objectives"], rtol=2e-3)

    rest = reports(
        stage, f"{way}-teacher-resumed", config, "--objectives", "--resume", str(stage / f"{way}-teacher/checkpoint-2")
    )
    np.testing.assert_allclose(rest[0]["losses"][-2:], one["losses"][-2:], rtol=1e-3)


@pytest.mark.parametrize("way", ["ddp", "zero2", "zero3"])
def test_an_adapter_with_projections_resumes_on_two_processes_as_if_never_stopped(way: str, stage: Path) -> None:
    config, distributed_type, *_ = WAYS[way]
    if distributed_type == "DEEPSPEED":
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    options = "--objectives", "--lora"
    whole = reports(stage, f"{way}-adapter", config, *options)
    rest = reports(
        stage, f"{way}-adapter-resumed", config, *options, "--resume", str(stage / f"{way}-adapter/checkpoint-1")
    )
    for one, other in zip(whole, rest, strict=True):
        assert one["batches"][1:] == other["batches"]
        assert {name.split(".")[-2] for name in one["weights"]} >= {"0", "default"}  # projection 0, and the adapter
        assert one["weights"] == other["weights"] == whole[0]["weights"]
    assert whole[0]["losses"] == rest[0]["losses"]


def test_fewer_samples_than_processes_do_not_hang(stage: Path) -> None:
    both = reports(stage, "few", WAYS["fsdp2"][0], "--rows", "1")
    assert [report["plans"] for report in both] == [[[0], [0]]] * 2


@pytest.mark.parametrize("way", ["ddp", "zero3", "fsdp2"])
def test_a_metric_with_forty_views_of_one_sample_and_one_of_another_does_not_hang(way: str, stage: Path) -> None:
    # From the longest on, samples are dealt out to process 0 1 1 0: process 1 gets those of forty steps.
    with open(stage / "steps.jsonl", "w", encoding="utf-8") as file:
        for place in range(8):
            many, one = " ".join(f"{step}!" for step in range(10, 99)), "yes and " * 40
            answer = (many if place % 4 in (1, 2) else one)[: 200 - 4 * place] + "!"  # a letter is a token
            row = {"prompt": f"{place}?", "completion": answer, "prompt_id": place // 2}
            file.write(json.dumps(row) + "\n")
    options = ["--metrics", "LocalNaturalness(window=4)", "--batch-tokens", "256"]
    both = reports(stage, f"steps-{way}", WAYS[way][0], *options, candidates="steps.jsonl")
    (one,) = reports(stage, f"steps-{way}-alone", None, *options, "--batch-size", "4", candidates="steps.jsonl")
    assert work(both[1]) > 3 * work(both[0]) > 0
    assert len(both[0]["shapes"]) == len(both[1]["shapes"])
    np.testing.assert_allclose(both[0]["scores"][0], one["scores"][0], rtol=WAYS[way][-1])
    assert both[0]["scores"] == both[1]["scores"]
    assert trained(both) == trained([one])


def test_a_process_that_gets_all_long_samples_is_waited_for(stage: Path) -> None:
    # Blocks of 32 tokens hold one sample each, whose reader is process 0.
    both = reports(stage, "long", WAYS["fsdp2"][0], "--batch-tokens", "4")
    assert work(both[0]) == 48  # 24 samples, twice
    assert work(both[1]) == 0
    assert len(both[0]["shapes"]) == len(both[1]["shapes"])
    np.testing.assert_allclose(both[1]["scores"][0], alone(stage)["scores"][0], rtol=1e-4)
    assert trained(both) == trained([alone(stage)])


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_a_compiled_student_scores_as_one_process_does(way: str, stage: Path) -> None:
    both = reports(stage, f"compiled-{way}", WAYS[way][0], "--compile")
    np.testing.assert_allclose(both[0]["scores"][0], alone(stage)["scores"][0], rtol=WAYS[way][-1])
    assert trained(both) == trained([alone(stage)])


@pytest.mark.parametrize("way", ["ddp", "zero3", "fsdp2"])
def test_in_bfloat16_scores_are_those_of_one_process_within_its_rounding(way: str, stage: Path) -> None:
    both = reports(stage, f"bf16-{way}", WAYS[way][0], "--bf16")
    (one,) = reports(stage, "bf16-alone", None, "--bf16", "--batch-size", "4")
    assert both[0]["numerics"]["dtype"] == one["numerics"]["dtype"] == "bfloat16"
    np.testing.assert_allclose(both[0]["scores"][0], one["scores"][0], rtol=0.05)
    assert both[0]["plans"] == both[1]["plans"]


def test_other_data_on_a_process_stops_the_run_with_what_differs(stage: Path) -> None:
    done = sft_run(stage, "other", WAYS["ddp"][0], "--rank-1", "reads other data")
    assert done.returncode != 0
    assert "The processes do not have the same data set: rank 0 has" in done.stderr


def test_a_process_that_dies_while_scoring_ends_the_others_soon(stage: Path) -> None:
    started = time.monotonic()
    done = sft_run(stage, "dies", WAYS["fsdp2"][0], "--rank-1", "dies")
    assert done.returncode != 0
    assert "exitcode  : 9" in done.stderr
    assert not (stage / "dies" / "checkpoint-1").exists()
    assert time.monotonic() - started < 150


@pytest.mark.parametrize("way", ["ddp", "zero3", "fsdp2"])
def test_a_process_that_hangs_while_scoring_ends_the_job_and_is_named_with_its_block(way: str, stage: Path) -> None:
    done = sft_run(stage, f"hangs-{way}", WAYS[way][0], "--rank-1", "hangs", "--timeout", "20")
    assert done.returncode != 0
    assert re.search(r"Behind are: rank 1 is reading its share of block \d+ of the pass, at sft_run\.py", done.stderr)
    assert re.search(r"sft_run\.py.* in note", done.stderr)  # the stack of the process that hangs
