"""Pushing from a training without pickles: `training_args.bin` and optimiser states stay on the machine.

Twins: the files of this name in the other folders that have a trainer.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress


PUSHED_SUFFIXES = (".json", ".safetensors", ".py", ".jinja", ".txt", ".model", ".md")


class PushesNoPickles:
    """Base of a `Trainer` whose pushes hold weights, configuration, code and card.

    Modifications: [`~transformers.Trainer.push_to_hub`] leaves `training_args.bin` out; pushes while training goes on
    take what belongs to the model from the checkpoint, whatever `hub_strategy` says (`"end"`: none).
    """

    _left_out: tuple[str, ...] = ()  # files of a checkpoint that are training state under a pushed ending
    _pushing = False

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push the model.

        Args:
            args (`Any`): As of [`~transformers.Trainer.push_to_hub`].
            kwargs (`Any`): Likewise.

        Returns:
            `CommitInfo`: Likewise.
        """
        self._pushing = True
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            self._pushing = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self._pushing:
            (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args, job = self.args, self.push_in_progress
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        running = job is not None and not job.is_done()
        if running and not args.hub_always_push:
            return
        for path in Path(checkpoint_folder).iterdir():
            if path.suffix in PUSHED_SUFFIXES and path.name not in (TRAINER_STATE_NAME, *self._left_out):
                shutil.copy(path, args.output_dir)
        upload = HfApi().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=args.output_dir,
            commit_message=f"Training in progress, step {self.state.global_step}",
            token=args.hub_token,
            run_as_future=True,
            allow_patterns=[f"*{suffix}" for suffix in PUSHED_SUFFIXES],
            ignore_patterns=["_*", ".*", f"{PREFIX_CHECKPOINT_DIR}-*", TRAINER_STATE_NAME, *self._left_out],
            revision=args.hub_revision,
        )
        if running:
            job.jobs.append(upload)
        else:
            self.push_in_progress = PushInProgress([upload])


__all__ = ["PushesNoPickles"]
