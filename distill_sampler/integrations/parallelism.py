"""Which kinds of parallelism a curriculum can score under: those where each process reads sequences of its own.

DDP, DeepSpeed ZeRO and FSDP are such: a process's forward needs the others' weights at most. Under tensor, context and
sequence parallelism several processes read *one* sequence together, and the samples that are dealt out to one of them
would have to be dealt out to all.
"""

from __future__ import annotations

from accelerate import Accelerator  # type: ignore[import-untyped]


def refuse_parallelism(accelerator: Accelerator) -> None:
    """Refuse parallelism within a sequence, wherever it was asked for.

    A trainer's accelerator knows it of accelerate's `ParallelismConfig`, of models that were loaded with
    `DistributedConfig(tp_size=…)`, whose size the trainer passes on, and of DeepSpeed's configuration.

    Args:
        accelerator: that the student is trained with: `trainer.accelerator`, or a loop's own.

    Raises:
        ValueError: tensor, context or sequence parallelism over more than one process.
    """
    sizes = []
    if (config := accelerator.parallelism_config) is not None:
        sizes += [
            ("tensor", "tp_size", config.tp_size),
            ("context", "cp_size", config.cp_size),
            ("sequence", "sp_size", config.sp_size),
        ]
    if (plugin := accelerator.deepspeed_plugin) is not None:
        tensor_parallel = plugin.deepspeed_config.get("tensor_parallel", {})
        sizes.append(("tensor", "tensor_parallel.autotp_size", tensor_parallel.get("autotp_size", 1)))
    for kind, setting, size in sizes:
        if size > 1:
            raise ValueError(
                f"{setting}={size} is {kind} parallelism: {size} processes read each sequence together, but a "
                f"curriculum deals out whole samples to single processes. Set {setting}=1, and spread the student over "
                "the processes with DeepSpeed ZeRO-3 or FSDP2."
            )
