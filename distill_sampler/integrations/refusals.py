"""The settings that a curriculum refuses, each with a message that names the argument and the cure.

A curriculum can score under parallelism in which each process reads its own sequences: DDP, DeepSpeed ZeRO and FSDP,
where a forward pass needs at most the weights that other processes hold. Under tensor, context and sequence parallelism
several processes read *one* sequence together, so all of them would need the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.utils.data
from accelerate import Accelerator  # type: ignore[import-untyped]
from transformers import Trainer, TrainingArguments
from transformers.training_args import ParallelMode

from distill_sampler.curriculum import Curriculum
from distill_sampler.integrations.own_order import refuse_own_order
from distill_sampler.integrations.trl import is_sft_trainer, refuse_sft_settings
from distill_sampler.integrations.versions import parallel_sizes, refuse_old_trl, sampling_of, without_logits
from distill_sampler.protocols import Objective


def refuse_settings(trainer: Trainer, *, replace_sampler: bool = False) -> None:
    """Refuse settings of a trainer under which no curriculum can keep its promises.

    Args:
        trainer: the trainer.
        replace_sampler: whether a sampler or data loader of its own may be replaced.

    Raises:
        ValueError: names the setting and the cure.
    """
    args = trainer.args
    if "_get_train_sampler" in vars(trainer):
        raise ValueError("A sampler is already attached to this trainer. Call attach once for each trainer.")
    if trainer.train_dataset is None:
        raise ValueError("The trainer has no train_dataset to choose from. Pass train_dataset= to the trainer.")
    if isinstance(trainer.train_dataset, torch.utils.data.IterableDataset):
        raise ValueError(
            "train_dataset is an IterableDataset: its rows have no index, so they cannot be chosen or ordered. Load "
            "it without streaming=True, or materialise it with Dataset.from_generator."
        )
    if (sampling := sampling_of(args)) is not None:
        setting, neutral = sampling
        raise ValueError(
            f"{setting} decides the order of samples, and so does a curriculum. Leave it at {neutral} and give the "
            "curriculum policies for the order you want."
        )
    if args.ignore_data_skip:
        raise ValueError(
            "ignore_data_skip=True would begin an epoch's plan again after a resume, and train some samples twice and "
            "others never. Leave it at False."
        )
    for name in ("dispatch_batches", "split_batches"):
        if getattr(args.accelerator_config, name):
            raise ValueError(
                f"accelerator_config.{name}=True distributes batches in another order than planned. Leave it at False."
            )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True restarts training with another batch size in the middle of an epoch's plan. "
            "Leave it at False and set per_device_train_batch_size to a size that fits."
        )
    if args.world_size > 1 and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ValueError(
            f"The trainer sees {args.n_gpu} GPUs in one process and would use DataParallel. Launch the script with "
            "accelerate launch, or limit it to one GPU with CUDA_VISIBLE_DEVICES."
        )
    refuse_parallelism(trainer.accelerator)
    refuse_own_order(trainer, replace=replace_sampler)
    if is_sft_trainer(trainer):
        refuse_old_trl()
        refuse_sft_settings(trainer)


def refuse_second_host(curriculum: Curriculum) -> None:
    """Refuse a second trainer or loop: a curriculum holds the scores and the plan of one student in one run.

    Raises:
        ValueError: it already drives another trainer or loop.
    """
    if curriculum.driven_by is not None:
        raise ValueError(
            f"This curriculum is attached to a {curriculum.driven_by} already, and holds its scores and plans. Make a "
            "second Curriculum(…) with the same metrics and policies."
        )


def refuse_for(curriculum: Curriculum, args: TrainingArguments) -> None:
    """Refuse settings of a trainer that conflict with what this curriculum does.

    Raises:
        ValueError: names the setting and the cure.
    """
    for wanted, what in ((curriculum.planner.gives_weights, "loss weights"), (curriculum.observe, "observe=True")):
        if wanted and args.torch_compile:
            raise ValueError(
                f"torch_compile=True compiles the forward pass, which then cannot be hooked for {what}. Leave one of "
                "the two off."
            )
    if curriculum.planner.gives_weights and (found := without_logits(args)):
        setting, cure = found
        raise ValueError(
            f"{setting} computes the loss without logits, so the loss weights of the policies cannot be applied. "
            f"{cure}, or use SampleBySoftmax instead of WeightBySoftmax: it draws samples in proportion to their "
            "weights."
        )
    if curriculum.rescore.every_steps is not None:
        # accelerate fetches one batch ahead while another is in use, and workers prefetch more
        ahead = 2 + args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2)
        steps = -(-ahead // args.gradient_accumulation_steps)
        if steps > curriculum.rescore.lag:
            raise ValueError(
                f"The data loader reads up to {steps} optimizer steps ahead (dataloader_num_workers="
                f"{args.dataloader_num_workers}), but Rescore(lag={curriculum.rescore.lag}) lets a new plan take "
                f"effect sooner than that. Set Rescore(lag={steps})."
            )


def refuse_for_objectives(objectives: Sequence[Objective], args: TrainingArguments) -> None:
    """Refuse settings under which objectives cannot see the student's forward pass.

    Raises:
        ValueError: names the setting and the cure.
    """
    for setting in ("torch_compile", "use_liger_kernel"):
        if objectives and getattr(args, setting):
            raise ValueError(
                f"{setting}=True: objective={objectives[0].name} cannot be computed inside the forward pass then. "
                "Leave one of the two off."
            )


def samples_per_step(args: TrainingArguments) -> int:
    """Samples that all processes together train on in one optimizer step."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def refuse_dispatching(accelerator: Accelerator) -> None:
    """Refuse an accelerator that distributes batches in another order than planned.

    Raises:
        ValueError: names the setting and the cure.
    """
    for name in ("dispatch_batches", "split_batches"):
        if getattr(accelerator.dataloader_config, name):
            raise ValueError(
                f"DataLoaderConfiguration({name}=True) distributes batches in another order than planned. Leave it at "
                "False."
            )


def refuse_parallelism(accelerator: Accelerator) -> None:
    """Refuse parallelism within a sequence, wherever it was configured.

    The accelerator knows of all three ways: accelerate's `ParallelismConfig`, a model that was loaded with
    `DistributedConfig(tp_size=…)` (the trainer passes its size on), and DeepSpeed's configuration.

    Args:
        accelerator: the one that the student is trained with: `trainer.accelerator`, or a loop's own.

    Raises:
        ValueError: tensor, context or sequence parallelism over more than one process.
    """
    sizes = []
    if (config := accelerator.parallelism_config) is not None:
        sizes += parallel_sizes(config)
    if (plugin := accelerator.deepspeed_plugin) is not None:
        tensor_parallel = plugin.deepspeed_config.get("tensor_parallel", {})
        sizes.append(("tensor", "tensor_parallel.autotp_size", tensor_parallel.get("autotp_size", 1)))
    for kind, setting, size in sizes:
        if size > 1:
            raise ValueError(
                f"{setting}={size} is {kind} parallelism: {size} processes read each sequence together, but a "
                f"curriculum gives each sample to one process. Set {setting}=1, and shard the student over the "
                "processes with DeepSpeed ZeRO-3 or FSDP2. Or score before training (distill-sampler score, without "
                f"{setting}), choose with distill-sampler select, and train on the rows that it writes, without attach."
            )
