"""Parallelism within a sequence is refused, wherever it was asked for; parallelism over samples is not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import DeepSpeedPlugin

from distill_sampler.integrations.refusals import refuse_parallelism
from tests import tiny
from tests.distributed.launcher import launch

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "accelerate_configs"


def accelerator(config: ParallelismConfig | None = None, deepspeed: dict[str, Any] | None = None) -> Any:
    """A stand-in with the two attributes that are read. Real ones need several processes; they are below."""
    plugin = None if deepspeed is None else DeepSpeedPlugin(hf_ds_config=deepspeed)
    return SimpleNamespace(parallelism_config=config, deepspeed_plugin=plugin)


@pytest.mark.parametrize(("setting", "kind"), [("tp_size", "tensor"), ("cp_size", "context"), ("sp_size", "sequence")])
def test_parallelism_within_a_sequence_is_refused_by_name(setting: str, kind: str) -> None:
    around = f"distill-sampler score, without {setting}.*distill-sampler select.*without attach"
    with pytest.raises(
        ValueError, match=f"^{setting}=2 is {kind} parallelism: 2 processes .* Set {setting}=1, and.*{around}"
    ):
        refuse_parallelism(accelerator(ParallelismConfig(**{setting: 2})))


def test_tensor_parallelism_of_deepspeed_is_refused() -> None:
    pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    zero = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1}
    refuse_parallelism(accelerator(deepspeed=zero))
    with pytest.raises(ValueError, match=r"^tensor_parallel.autotp_size=4 is tensor parallelism: 4 processes"):
        refuse_parallelism(accelerator(deepspeed={**zero, "tensor_parallel": {"autotp_size": 4}}))


@pytest.mark.parametrize("sizes", [{}, {"dp_shard_size": 8}, {"dp_replicate_size": 2, "dp_shard_size": 4}])
def test_parallelism_over_samples_is_welcome(sizes: dict[str, int]) -> None:
    refuse_parallelism(accelerator(ParallelismConfig(**sizes)))


def test_an_ordinary_accelerator_is_welcome() -> None:
    refuse_parallelism(Accelerator(cpu=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (CONFIGS / "cpu.yaml", "tp_size"),
        (HERE / "cpu_fsdp2.yaml", "cp_size"),
        (CONFIGS / "cpu_zero2.yaml", "sp_size"),
        (CONFIGS / "cpu.yaml", "DistributedConfig"),
    ],
    ids=["tensor", "context", "sequence", "tensor, of the model"],
)
def test_real_trainers_on_two_processes_are_refused(config: Path, setting: str, tmp_path: Path) -> None:
    if "zero" in config.name:
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    tiny.model().save_pretrained(tmp_path)
    options, environment = [str(tmp_path), "--tensor-parallel-model"], {}
    if setting != "DistributedConfig":
        options = [str(tmp_path)]
        environment = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", f"PARALLELISM_CONFIG_{setting.upper()}": "2"}
    done = launch(HERE / "parallel_run.py", *options, cwd=tmp_path, config=config, environment=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    name = "tp_size" if setting == "DistributedConfig" else setting
    assert done.stdout.count(f"{name}=2 is ") == 2
