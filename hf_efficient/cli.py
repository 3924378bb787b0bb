"""The `hf-efficient` command.

A subcommand is a class in the module of its part, named once in `_COMMANDS` and loaded only when it is called. Its
docstring is the text of `--help`, examples included. It has two static methods: `add_arguments(parser)`, and
`run(arguments) -> dict`, whose result `--json` writes and whose `"text"` the terminal shows. `run` raises
`ValueError`, `OSError` or `ImportError` with one clear sentence where the user can mend something; `main` turns that
into exit code 2, and names of arguments in backticks into what was typed (`` `overwrite=True` `` into `--overwrite`).
Where only part of the work could be done, the result of `run` says so in one sentence under `"incomplete"`: the rest
is written and shown as ever, the sentence goes to standard error, and the exit code is 3.
A command that was interrupted and knows what it kept raises `KeyboardInterrupt` with that sentence.
Every subcommand has `--json FILE` and `--quiet`. Standard output belongs to the result: whatever a library prints
while the command runs goes to standard error.
"""

import argparse
import inspect
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any, NoReturn


# subcommand -> (module below this package, class in it, one line for `hf-efficient --help`)
_COMMANDS: dict[str, tuple[str, str, str]] = {
    "quickstart": ("quickstart", "Quickstart", "run every method once on real, embedded data"),
    "convert-llava": (
        "dynamic_llava.commands_dynamic_llava",
        "ConvertLlava",
        "give a LLaVA checkpoint the predictors of Dynamic-LLaVA",
    ),
    "convert-dynamic-llava": (
        "dynamic_llava.commands_dynamic_llava",
        "ConvertDynamicLlava",
        "convert a checkpoint of the Dynamic-LLaVA authors",
    ),
    "prune": ("kdfs.commands_kdfs", "Prune", "prune the filters of an image classifier"),
    "convert-pix2pix": (
        "pix2pix.commands_pix2pix",
        "ConvertPix2Pix",
        "convert a generator of the widely used PyTorch implementation",
    ),
    "cartoonize": ("pix2pix.commands_pix2pix", "Cartoonize", "turn photographs into cartoons"),
    "translate": ("pix2pix.commands_pix2pix", "Translate", "translate pictures with an image-to-image model"),
    "robustness": ("pix2pix.commands_pix2pix", "Robustness", "measure a cartoon-to-photo model on other cartoons"),
    "report": ("report.commands_report", "Report", "measure what a model costs and what a method saves"),
    "demo": ("demo.commands_demo", "Demo", "show the four methods in a browser"),
    "push": ("hub", "Push", "push a checkpoint folder with its card to the Hub"),
}

_EPILOG = """\
examples:
  hf-efficient quickstart
  hf-efficient convert-llava llava-hf/llava-1.5-7b-hf ./sparse-llava
  hf-efficient push ./sparse-llava user/sparse-llava --private

`hf-efficient COMMAND --help` shows the options of a command. Exit code 2 means wrong input, with one sentence that
says what to change (set HF_EFFICIENT_TRACEBACK=1 to see the traceback as well); 3 that part of the work is done and
written, with one sentence that names the rest; 130 that it was interrupted.
"""


class _Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that complains in one sentence and knows how each argument is typed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.typed: dict[str, str] = {}  # name in Python -> what a user types
        super().__init__(*args, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        """Add an argument and note its spelling."""
        action = super().add_argument(*args, **kwargs)
        options = action.option_strings
        self.typed[action.dest] = options[-1] if options else str(action.metavar or action.dest)
        return action

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv (`list[str]`, *optional*): Arguments; default: those of the process.

    Returns:
        `int`: Exit code: 0, 2 on wrong input, 3 when part of the work is done, 130 when interrupted. `--help` and
        wrong options end by `SystemExit`.
    """
    argv = sys.argv[1:] if argv is None else argv
    chosen = argv[0] if argv and argv[0] in _COMMANDS else None
    title = f"hf-efficient {chosen}" if chosen else "hf-efficient"
    typed: dict[str, str] = {}

    def work() -> int:
        command = load_command(chosen) if chosen else None
        parser, spelling = _build_parser(chosen, command)
        typed.update(spelling)
        return run_command(command, parser.parse_args([_with_dashes(word) for word in argv]), title)

    return guard(title, typed, work)


def guard(title: str, typed: Mapping[str, str], work: Callable[[], int]) -> int:
    """Turn wrong input and interruptions into one sentence and an exit code.

    Args:
        title (`str`): What the sentences begin with, such as `hf-efficient prune`.
        typed (`Mapping[str, str]`): Name of an argument in Python -> what a user types for it.
        work (`Callable`): What to do; its exit code is handed on.

    Returns:
        `int`: Exit code: that of `work`, 2 on wrong input, 130 when interrupted.
    """
    try:
        return work()
    except KeyboardInterrupt as stop:
        kept = " ".join(str(stop).split()) or "files that are there are whole, and the same command begins anew."
        sys.stderr.write(f"\n{title}: interrupted; {kept}\n")
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("HF_EFFICIENT_TRACEBACK"):
            raise
        sys.stderr.write(f"{title}: error: {describe(error, typed)}\n")
        return 2


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--json` and `--quiet`.

    Args:
        parser (`ArgumentParser`): Of a command that [`run_command`] runs.
    """
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON ('-' for standard output)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no messages but errors")


def run_command(command: Any, arguments: argparse.Namespace, title: str) -> int:
    """Run a command and write its result.

    Args:
        command (`Any`): With `run(arguments) -> dict`.
        arguments (`Namespace`): Parsed, those of [`add_output_arguments`] among them.
        title (`str`): What a sentence about unfinished work begins with.

    Returns:
        `int`: Exit code: 0, or 3 when part of the work is done.
    """
    _check_json(arguments.json)
    with _output(arguments.quiet):
        _import_package().register()
        report = command.run(arguments)
    incomplete = report.pop("incomplete", None)
    _write_report(report, arguments)
    if incomplete:
        sys.stderr.write(f"{title}: incomplete: {' '.join(incomplete.split())}\n")
        return 3
    return 0


def describe(error: Exception, typed: Mapping[str, str]) -> str:
    """Say on one line what is wrong, in the words of the command line.

    Args:
        error (`Exception`): What was raised.
        typed (`Mapping[str, str]`): Name of an argument in Python -> what a user types for it.

    Returns:
        `str`: The message; `` `name` `` and `` `name=True` `` of an argument are replaced by its spelling.
    """
    if isinstance(error, OSError) and error.strerror and error.filename:  # straight from the operating system
        return f"{os.fspath(error.filename)}: {error.strerror}; check this path, or choose another one."
    message = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"`(\w+)(?:=\w+)?`", lambda match: typed.get(match[1], match[0]), message)


def _with_dashes(word: str) -> str:
    """An option as it is spelt here, where it was typed with underscores as arguments of a `Trainer` script are."""
    option = re.match(r"--[a-z][\w-]*(?==|$)", word)
    return word if option is None else option[0].replace("_", "-") + word[option.end() :]


def _import_package() -> Any:
    return import_module(__package__)


def load_command(name: str) -> Any:
    """Load a subcommand from its file alone: the folder around it would load torch, also for `--help`.

    Args:
        name (`str`): As it is typed, such as `prune`.

    Returns:
        `Any`: Its class.
    """
    module, attribute, _ = _COMMANDS[name]
    full = f"{__package__}.{module}"
    folder = full.rpartition(".")[0]
    if folder in sys.modules or full in sys.modules:
        return getattr(import_module(full), attribute)
    spec = PathFinder.find_spec(full, [str(Path(__file__).parent.joinpath(*module.split(".")[:-1]))])
    found = sys.modules[full] = module_from_spec(spec)
    try:
        spec.loader.exec_module(found)
    except BaseException:
        del sys.modules[full]
        raise
    return getattr(found, attribute)


def _build_parser(chosen: str | None, command: Any) -> tuple[argparse.ArgumentParser, dict[str, str]]:
    """Build the parser: all subcommands by name, only the chosen one with its arguments, whose spelling comes too."""
    raw = argparse.RawDescriptionHelpFormatter
    description = _import_package().__doc__.split("\n")[0]
    parser = _Parser(prog="hf-efficient", description=description, epilog=_EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"hf-efficient {_import_package().__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    typed: dict[str, str] = {}
    for name, (_, _, summary) in _COMMANDS.items():
        if name != chosen:
            subparsers.add_parser(name, help=summary, add_help=False)
            continue
        words = inspect.cleandoc(command.__doc__)
        subparser = subparsers.add_parser(name, help=summary, description=words, formatter_class=raw)
        command.add_arguments(subparser)
        add_output_arguments(subparser)
        typed = subparser.typed
    return parser, typed


def _check_json(file: str | None) -> None:
    """Refuse a file that cannot be written before the work starts."""
    if file is None or file == "-":
        return
    from .results import check_target

    check_target("--json", file)


@contextmanager
def _output(quiet: bool) -> Iterator[None]:
    """Keep standard output for the result, and what libraries have to say about themselves away from the terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as library

    own = logging.getLogger(__package__)
    level, verbosity = own.level, library.get_verbosity()
    bars, hub_bars = library.is_progress_bar_enabled(), not are_progress_bars_disabled()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        library.set_verbosity_error()
    if quiet:
        own.setLevel(logging.ERROR)
        disable_progress_bars()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings(), open(os.devnull, "w", encoding="utf-8") as nowhere:
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            with redirect_stdout(nowhere if quiet else sys.stderr):
                yield
    finally:
        own.setLevel(level)
        library.set_verbosity(verbosity)
        if quiet and hub_bars:
            enable_progress_bars()
        if quiet and bars:
            library.enable_progress_bar()


def _write_report(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    text = report.pop("text", "")
    if arguments.json == "-":
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    if arguments.json:
        from .results import write_whole

        document = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        write_whole(Path(arguments.json), _escape(document, "utf-8"))
    if text and not arguments.quiet:
        sys.stdout.write(_escape(text.rstrip("\n"), sys.stdout.encoding or "utf-8") + "\n")


def _escape(text: str, encoding: str) -> str:
    r"""Write what an encoding lacks as `\u...`, such as names of files that were given in another one."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


if __name__ == "__main__":
    sys.exit(main())
