"""The converting subcommands of `hf-efficient`."""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any


class ConvertLlava:
    """Give a LLaVA checkpoint the predictors of Dynamic-LLaVA.

    SOURCE is a Hub id or a folder of a LLaVA-1.5 type checkpoint (Llama, Mistral or Qwen2 text backbone) with
    safetensors weights. DEST must not exist or be empty; it appears when it is whole. The new predictors are
    untrained: train them with DynamicLlavaTrainer before you judge answers.

    Examples:
      hf-efficient convert-llava llava-hf/llava-1.5-7b-hf ./sparse-llava --dtype bfloat16
      hf-efficient convert-llava ./my-llava ./sparse-llava --vision-keep-rate 0.3 --sparse-layer 3
    """

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of `convert-llava` to `parser`."""
        parser.add_argument("source", help="Hub id or folder of a LLaVA checkpoint")
        parser.add_argument("dest", help="folder to write; absent or empty")
        parser.add_argument(
            "--vision-keep-rate", type=float, metavar="RATE", help="share of image tokens kept, in (0, 1]"
        )
        parser.add_argument(
            "--sparse-layer", type=int, metavar="LAYER", help="first decoder layer that sees kept tokens only"
        )
        parser.add_argument("--dtype", default="auto", help="dtype of the weights (default: as stored)")
        parser.add_argument("--revision", help="branch, tag or commit of a Hub id")

    @staticmethod
    def run(arguments: argparse.Namespace) -> dict[str, Any]:
        """Convert, save whole and report the size."""
        from transformers import AutoProcessor
        from transformers.utils import logging

        from .modeling_dynamic_llava import DynamicLlavaForConditionalGeneration

        dest = Path(arguments.dest)
        if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
            raise FileExistsError(f"dest {dest} must not exist or be an empty folder; choose another or empty it.")
        settings = {name: getattr(arguments, name) for name in ("vision_keep_rate", "sparse_layer", "revision")}
        settings = {name: value for name, value in settings.items() if value is not None}
        model = DynamicLlavaForConditionalGeneration.from_llava(
            arguments.source, dtype=arguments.dtype, use_safetensors=True, **settings
        )
        revision = {"revision": arguments.revision} if arguments.revision else {}
        try:
            processor = AutoProcessor.from_pretrained(arguments.source, **revision)
        except (OSError, ValueError) as error:
            logging.get_logger(__name__).warning("No processor is saved, SOURCE has none that loads: %s", error)
            processor = None
        temporary = dest.with_name(f".{dest.name}.{os.getpid()}.tmp")
        try:
            model.save_pretrained(temporary)
            if processor is not None:
                processor.save_pretrained(temporary)
            dest.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, dest)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        predictors = sum(p.numel() for name, p in model.named_parameters() if "score_predictor" in name)
        return {
            "folder": str(dest),
            "parameters": model.num_parameters(),
            "predictor_parameters": predictors,
            "processor": processor is not None,
            "text": f"Wrote {dest} with {predictors:,} untrained parameters in predictors.",
        }


class ConvertDynamicLlava:
    """Convert a checkpoint in the layout of the Dynamic-LLaVA authors.

    SOURCE is a Hub id or a folder with config.json, safetensors weights and, where there is one, a tokenizer; pickled
    weights are never read. DEST must not exist or be empty unless --overwrite is given; it appears when it is whole.

    Examples:
      hf-efficient convert-dynamic-llava ./authors-checkpoint ./sparse-llava
      hf-efficient convert-dynamic-llava ./authors-checkpoint ./sparse-llava --overwrite
    """

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of `convert-dynamic-llava` to `parser`."""
        parser.add_argument("source", help="Hub id or folder in the authors' layout")
        parser.add_argument("dest", help="folder to write; absent or empty")
        parser.add_argument("--overwrite", action="store_true", help="replace DEST if it holds something")

    @staticmethod
    def run(arguments: argparse.Namespace) -> dict[str, Any]:
        """Convert and say where the checkpoint is."""
        from .convert_dynamic_llava import convert_dynamic_llava_checkpoint

        folder = convert_dynamic_llava_checkpoint(arguments.source, arguments.dest, overwrite=arguments.overwrite)
        return {"folder": str(folder), "text": f"Wrote {folder}."}
