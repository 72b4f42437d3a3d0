"""TRL's trainers as the stages use them: either generation of the libraries, and whole checkpoints alone."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc.core.errors import HpcError, Refused
from hpc.core.rundir import RANKS, read_json, write_json
from hpc.inside import heldout, models, together

_PART = ".part"
"""The folder in which a checkpoint is written, beside the whole ones."""
REFERENCE = "ref"
"""The adapter beside the one that is trained, by TRL's name; it is in no checkpoint."""


def fields(kind: str) -> set[str]:
    """What TRL's config of that name has in the installed generation."""
    import trl

    return {field.name for field in dataclasses.fields(getattr(trl, kind))}


def arguments(wanted: Mapping[str, Any], kind: str = "SFTConfig") -> Any:
    """TRL's config of that name with these values, by the names of the installed generation."""
    import trl

    known = fields(kind)
    values = dict(wanted)
    if "train_sampling_strategy" not in known:  # transformers 4
        values["group_by_length"] = values.pop("train_sampling_strategy", "") == "group_by_length"
        values["warmup_ratio"] = values.pop("warmup_steps")
    if "max_prompt_length" in known:  # trl below 1 would cut the beginning of a prompt, and of what is too long
        values.update(max_prompt_length=None, truncation_mode="keep_start")
    return getattr(trl, kind)(**values)


def need(trackers: Sequence[str], folder: Path) -> None:
    """HpcError where the image lacks a tracker that is to be reported to: said before a model is loaded.

    Those that were told no place write into `folder`, and W&B without a key calls nobody.
    """
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise HpcError(
                f'finetune.report_to = ["{name}"] needs {name}, which is not in this image',
                hint="take it out (training/ has the curves all the same), or add it in an image that stands on train",
            )
    if trackers:
        folder.mkdir(exist_ok=True)
        os.environ.setdefault("WANDB_DIR", str(folder))
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        if "WANDB_API_KEY" not in os.environ and not Path("~/.netrc").expanduser().exists():
            os.environ.setdefault("WANDB_MODE", "offline")


def need_compiler(*, gpu: bool) -> None:
    """HpcError where torch.compile would find no compiler, which it says only at the first step."""
    names = [os.environ.get("CC", "gcc"), "gcc", "clang"] if gpu else [os.environ.get("CXX", "g++")]
    if not any(map(shutil.which, names)):
        raise HpcError(
            f"finetune.compile needs a compiler ({names[0]}), which is not in this image",
            hint="set finetune.compile = false, or add one in an image that stands on train",
        )


def spread(sharding: str, *, gradient_checkpointing: bool, gpu: bool) -> dict[str, Any]:
    """The arguments that say how several ranks share the work."""
    if sharding in ("zero2", "zero3"):
        if importlib.util.find_spec("deepspeed") is None:
            raise HpcError(
                f'sharding = "{sharding}" needs deepspeed, which is not in this image',
                hint='set finetune.sharding = "fsdp", which needs nothing more',
            )
        return {"deepspeed": _zero(int(sharding[-1]))}
    if together.world() == 1:
        return {}
    shared: dict[str, Any] = {"ddp_backend": "nccl" if gpu else "gloo"}
    if sharding == "fsdp":
        layers = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "version": 2, "reshard_after_forward": True}
        config = {**layers, "activation_checkpointing": gradient_checkpointing, "state_dict_type": "FULL_STATE_DICT"}
        return {**shared, "fsdp": "full_shard auto_wrap", "fsdp_config": config}
    return {**shared, "ddp_find_unused_parameters": False}


def _zero(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration; "auto" is what the other arguments say."""
    return {
        "zero_optimization": {"stage": stage, "overlap_comm": True, "stage3_gather_16bit_weights_on_model_save": True},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }


def trainer(
    *,
    model: Any,
    arguments: Any,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    keep: int,
    kind: str = "SFTTrainer",
    **options: Any,
) -> Any:
    """TRL's trainer of that name over the rows ("train", "eval"); of its checkpoints the last `keep` stay."""
    import datasets
    import transformers
    import trl

    class Trainer(getattr(trl, kind)):  # type: ignore[misc]
        def _get_output_dir(self, trial: Any) -> str:
            return os.path.join(self.args.output_dir, _PART)

        def evaluate(self, *given: Any, **options: Any) -> dict[str, float]:
            try:
                found: dict[str, float] = super().evaluate(*given, **options)
            except heldout.StopError:
                if not self.is_in_train:
                    raise
                self.control.should_evaluate = False
                self.control.should_save = self.control.should_training_stop = True
                return {}
            return found

        def _save_checkpoint(self, model: Any, trial: Any = None, **others: Any) -> None:
            super()._save_checkpoint(model, trial, **others)
            together.barrier()
            if together.rank() == 0:
                _publish(Path(self.args.output_dir), self.state.global_step, keep)
            together.barrier()

    datasets.disable_progress_bars()
    if together.rank() == 0:  # what a kill has left half written
        shutil.rmtree(Path(arguments.output_dir) / _PART, ignore_errors=True)
    divided = _divided(arguments)
    transformers.set_seed(arguments.seed)  # it seeds itself only after a new adapter has got its first weights
    made = Trainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(list(rows["train"])),
        eval_dataset=datasets.Dataset.from_list(list(rows["eval"])) if rows["eval"] else None,
        **options,
    )
    if made.args.world_size != together.world():
        raise HpcError(
            f"this training has {made.args.world_size} ranks, and {together.world()} were started",
            hint="the image's accelerate does not see them: `hpc logs` has its warnings",
        )
    if divided not in ("", str(made.accelerator.distributed_type.value)):
        raise HpcError(
            f"{divided} was asked for, and accelerate would do {made.accelerator.distributed_type.value}",
            hint='set finetune.sharding = "none": each rank then has the whole model',
        )
    return made


def _divided(arguments: Any) -> str:
    """accelerate's name of what shares the model out; empty: nothing. On CPUs it is led to FSDP (docs/adr/0035)."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if arguments.deepspeed:
        return str(DistributedType.DEEPSPEED.value)
    if not arguments.fsdp:
        return ""
    if arguments.device.type == "cpu":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return str(DistributedType.FSDP.value)


def resumed(folder: Path) -> Path | None:
    """
    The checkpoint to go on from, as the first rank sees it: a file server may show it late to another node. Refused
    where another number of ranks made it: its steps were of other batches, and there were more or fewer to do.
    """
    step, ranks, world = 0, 0, together.world()
    if together.rank() == 0:
        found = models.checkpoints(folder)
        step = models.step_of(found[0]) if found else 0
        ranks = int((read_json(folder / RANKS) or {}).get("ranks", world)) if step else world
    step, ranks = map(int, together.summed([float(step), float(ranks)]))
    if ranks != world:
        raise Refused(
            f"checkpoint-{step} is of a training by {ranks} ranks, and this one has {world}",
            hint=f"set resources to nodes × gpus_per_node = {ranks} again, or remove {folder} to begin anew",
        )
    if together.rank() == 0:
        write_json(folder / RANKS, {"ranks": world})
    return folder / f"checkpoint-{step}" if step else None


class DoneError(Exception):
    """The checkpoint to go on from is that of the last step."""


def train(trainer: Any, resumed: Path | None) -> float:
    """Train on from the checkpoint; in how many seconds: none where it was that of the last step."""
    try:
        result = trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    except DoneError:
        trainer.is_in_train = False
        return 0.0
    return float(result.metrics["train_runtime"])


def _publish(folder: Path, step: int, keep: int) -> None:
    """Let a written checkpoint appear, whole and on the disk, and take away the oldest."""
    name = f"checkpoint-{step}"
    part = folder / _PART / name
    shutil.rmtree(part / REFERENCE, ignore_errors=True)  # transformers would go on from it alone
    for place, _, files in os.walk(part, topdown=False):
        for path in (*(os.path.join(place, file) for file in files), place):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    shutil.rmtree(folder / name, ignore_errors=True)
    os.rename(part, folder / name)
    for old in models.checkpoints(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
