"""What a pruning leaves on disk while it goes on: settings, checkpoints of both phases, the sampled network."""

import copy
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from .masking_kdfs import KDFSMaskedModel
from .trainer_kdfs import KDFSTrainer


logger = logging.get_logger(__name__)

RUN_NAME = "kdfs_run.json"
SAMPLED_NAME = "sampled.safetensors"
HISTORY_NAME = "sampled_history.json"
PHASES = ("sampling", "fine_tuning")
PHASE_WORDS = ("choosing filters", "training the smaller network")


class Run:
    """What is on disk while a run goes on: settings, checkpoints of both phases, the sampled network.

    Args:
        folder (`Path`): `args.output_dir`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.resumes = False
        self.sampled = False

    def open(self, settings: dict[str, Any], trainer: KDFSTrainer) -> None:
        """Continue a run with the same settings, or start one."""
        path = self.folder / RUN_NAME
        if path.is_file():
            before, now = _flat(json.loads(path.read_text(encoding="utf-8"))), _flat(settings)
            changed = [name for name in now if before.get(name) != now[name]]
            self.sampled = (self.folder / SAMPLED_NAME).is_file()
            begun = self.sampled or last_whole_checkpoint(self.folder / PHASES[0]) is not None
            if changed and begun:
                name = changed[0]
                raise ValueError(
                    f"{self.folder} holds an interrupted run with `{name}` {before.get(name)} instead of "
                    f"{now[name]}; start it as it was, give this one another folder or remove {self.folder}."
                )
            self.resumes = not changed
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero() and not self.resumes:
            self.folder.mkdir(parents=True, exist_ok=True)
            for phase in PHASES:  # a finished run's checkpoints must not be taken for this one's
                for checkpoint in _checkpoints(self.folder / phase):
                    shutil.rmtree(checkpoint)
            for name in (SAMPLED_NAME, HISTORY_NAME):  # left where a run was cut off while it was closed
                (self.folder / name).unlink(missing_ok=True)
            write_json(path, settings)
        trainer.accelerator.wait_for_everyone()

    def phase_arguments(self, args: TrainingArguments, phase: str) -> TrainingArguments:
        """Arguments of one phase, with a folder of its own."""
        arguments = copy.copy(args)
        arguments.output_dir = str(self.folder / phase)
        arguments.push_to_hub = False
        return arguments

    def last_checkpoint(self, phase: str) -> str | None:
        """Newest whole checkpoint of a phase of an interrupted run."""
        found = last_whole_checkpoint(self.folder / phase) if self.resumes else None
        if found is not None:
            logger.warning("Continuing the %s phase from %s.", phase, found)
        return found

    def save_sampled(self, masked: KDFSMaskedModel, history: list[dict[str, Any]]) -> None:
        """Keep the result of the sampling phase."""
        unfinished = self.folder / f".{uuid.uuid4().hex}"
        state = {name: value.contiguous() for name, value in masked.state_dict().items()}
        write_json(self.folder / HISTORY_NAME, history)
        save_file(state, unfinished)
        os.replace(unfinished, self.folder / SAMPLED_NAME)

    def load_history(self) -> list[dict[str, Any]]:
        """What the sampling phase logged."""
        return json.loads((self.folder / HISTORY_NAME).read_text(encoding="utf-8"))

    def close(self) -> None:
        """The run is over: the next one in this folder starts from the beginning."""
        for name in (RUN_NAME, SAMPLED_NAME, HISTORY_NAME):
            (self.folder / name).unlink(missing_ok=True)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run with those of the method among them, so that a single one can be named."""
    return {**settings.get("pruning_config", {}), **{k: v for k, v in settings.items() if k != "pruning_config"}}


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a Trainer, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def last_whole_checkpoint(folder: str | os.PathLike) -> str | None:
    """Newest checkpoint in a Trainer's folder that was written to its end.

    A process that is ended while it writes leaves a folder without `trainer_state.json`, which comes last, or with a
    part of it; a full disk leaves weights or an optimiser state that end early.

    Args:
        folder (`str` or `os.PathLike`): `args.output_dir` of the Trainer; it need not exist.

    Returns:
        `str` or `None`: The checkpoint, for `resume_from_checkpoint`.
    """
    for path in reversed(_checkpoints(Path(folder))):
        if _is_whole(path):
            return str(path)
        logger.warning("%s was cut off while it was written and is passed over.", path)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint has its end; the tensors themselves are not read."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(_ends_well(file) for file in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")))


def _ends_well(file: Path) -> bool:
    """Whether a file of `torch.save` holds the record with which a zip archive ends; it is not opened as one."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - (1 << 16)))
        return b"PK\x05\x06" in stream.read()


def train_to_the_end(trainer: Trainer, checkpoint: str | None) -> None:
    """Train, from a checkpoint where there is one; of one at the last step only the weights are read.

    A [`~transformers.Trainer`] that goes on from there takes one step more where that step is not the last of an
    epoch.

    Args:
        trainer ([`~transformers.Trainer`]): Not yet trained, with `max_steps`.
        checkpoint (`str`, *optional*): Of the same trainer.
    """
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)) if checkpoint else None
    if state is None or state.global_step < trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=checkpoint)
        return
    trainer.state = state
    trainer._load_from_checkpoint(checkpoint)
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        trainer._load_best_model()


def describe_kept(folder: str | os.PathLike) -> str:
    """Say what an interrupted run left to go on from.

    Args:
        folder (`str` or `os.PathLike`): `args.output_dir` of the run.

    Returns:
        `str`: Such as "the chosen filters and step 300 of training the smaller network", empty if there is nothing.
    """
    folder = Path(folder)
    if not (folder / RUN_NAME).is_file():
        return ""
    sampled = (folder / SAMPLED_NAME).is_file()
    checkpoint = last_whole_checkpoint(folder / PHASES[int(sampled)])
    step = f"step {checkpoint.rpartition('-')[2]} of {PHASE_WORDS[int(sampled)]}" if checkpoint else ""
    return " and ".join(filter(None, ["the chosen filters" if sampled else "", step]))


def write_json(path: Path, document: Any) -> None:
    """Write a file that appears whole or not at all.

    Args:
        path (`Path`): In a folder that exists.
        document (`Any`): What goes into it as JSON.
    """
    unfinished = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    unfinished.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
