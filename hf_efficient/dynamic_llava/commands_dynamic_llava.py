"""The converting subcommands of `hf-efficient`."""

import argparse
from typing import Any


class ConvertLlava:
    """Give a LLaVA checkpoint the predictors of Dynamic-LLaVA.

    SOURCE is a Hub id or a folder of a LLaVA-1.5 type checkpoint (Llama, Mistral or Qwen2 text backbone) with
    safetensors weights. DEST must not exist or be empty unless --overwrite is given; it appears when it is whole. The
    new predictors are untrained: train them with DynamicLlavaTrainer before you judge answers.

    Examples:
      hf-efficient convert-llava llava-hf/llava-1.5-7b-hf ./sparse-llava --dtype bfloat16
      hf-efficient convert-llava ./my-llava ./sparse-llava --vision-keep-rate 0.3 --sparse-layer 3
    """

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of `convert-llava` to `parser`."""
        parser.add_argument("source", metavar="SOURCE", help="Hub id or folder of a LLaVA checkpoint")
        parser.add_argument("destination", metavar="DEST", help="folder to write; absent or empty")
        parser.add_argument(
            "--vision-keep-rate", type=float, metavar="RATE", help="share of image tokens kept, in (0, 1]"
        )
        parser.add_argument(
            "--sparse-layer", type=int, metavar="LAYER", help="first decoder layer that sees kept tokens only"
        )
        parser.add_argument(
            "--dtype", default="auto", help="dtype of the weights, such as bfloat16 (default: as stored)"
        )
        parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
        parser.add_argument("--overwrite", action="store_true", help="replace DEST if it holds something")

    @staticmethod
    def run(arguments: argparse.Namespace) -> dict[str, Any]:
        """Convert and say where the checkpoint is."""
        from .convert_dynamic_llava import convert_llava_checkpoint

        settings = {name: getattr(arguments, name) for name in ("vision_keep_rate", "sparse_layer")}
        folder = convert_llava_checkpoint(
            arguments.source,
            arguments.destination,
            overwrite=arguments.overwrite,
            dtype=arguments.dtype,
            revision=arguments.revision,
            **{name: value for name, value in settings.items() if value is not None},
        )
        return {"folder": str(folder), "text": f"Wrote {folder}; its predictors are untrained."}


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
        parser.add_argument("source", metavar="SOURCE", help="Hub id or folder in the authors' layout")
        parser.add_argument("destination", metavar="DEST", help="folder to write; absent or empty")
        parser.add_argument("--overwrite", action="store_true", help="replace DEST if it holds something")

    @staticmethod
    def run(arguments: argparse.Namespace) -> dict[str, Any]:
        """Convert and say where the checkpoint is."""
        from .convert_dynamic_llava import convert_dynamic_llava_checkpoint

        folder = convert_dynamic_llava_checkpoint(
            arguments.source, arguments.destination, overwrite=arguments.overwrite
        )
        return {"folder": str(folder), "text": f"Wrote {folder}."}
