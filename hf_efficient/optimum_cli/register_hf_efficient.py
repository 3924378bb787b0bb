"""`optimum-cli prune kdfs`: read by Optimum from the namespace `optimum.commands.register` at every start.

Installed under that name by `package_dir` in setup.py, so neither torch nor the package loads before it is asked for.
"""

import inspect
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class KDFSCommand(BaseOptimumCLICommand):
    """Prune the filters of an image classifier (KDFS)."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the arguments, which `hf-efficient prune` shares.

        Args:
            parser (`ArgumentParser`): Parser of `optimum-cli prune kdfs`.
        """
        if "prune" in sys.argv[1:2]:  # another command must not wait for this package
            from hf_efficient.cli import add_output_arguments, load_command

            prune = load_command("prune")
            parser.description = inspect.cleandoc(prune.__doc__)
            parser.formatter_class = RawDescriptionHelpFormatter
            prune.add_arguments(parser, method=False)
            add_output_arguments(parser)

    def run(self) -> None:
        """Prune; wrong input ends with one sentence and exit code 2, an interruption with 130."""
        from hf_efficient.cli import guard, load_command, run_command

        title = "optimum-cli prune kdfs"
        typed = {name: f"--{name.replace('_', '-')}" for name in vars(self.args)}
        code = guard(title, typed, lambda: run_command(load_command("prune"), self.args, title))
        if code:
            sys.exit(code)


class PruneCommand(BaseOptimumCLICommand):
    """Make a model smaller."""

    COMMAND = CommandInfo(name="prune", help="Remove the least useful parts of a model.")
    SUBCOMMANDS = (
        CommandInfo(name="kdfs", help="Learn which filters of a CNN to drop.", subcommand_class=KDFSCommand),
    )


REGISTER_COMMANDS = [PruneCommand]
