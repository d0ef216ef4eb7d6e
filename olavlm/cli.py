"""What every command line shares: options anywhere, one-line errors, exit codes, an honest word after Ctrl-C, bytes for
people."""

import argparse
import errno
import sys
from collections.abc import Callable
from typing import Any

from olavlm.errors import OlaError


class Command(argparse.ArgumentParser):
    """A subcommand (``add_subparsers(parser_class=Command)``) whose options may stand anywhere.

    argparse alone takes no more overrides once it has seen an option behind the first positional arguments.
    """

    _mixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which its `parse_known_intermixed_args` calls in turn."""
        if self._mixed:
            return super().parse_known_args(args, namespace)
        self._mixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixed = False


def run(main: Callable[[], int | None], resume: str = "run the same command again to resume") -> int:
    """Run `main` and turn what went wrong into one clear line.

    Exit codes: 0 done, 1 the command ran and found a problem (`main` returned 1), 2 bad input or a full disk,
    130 Ctrl-C.
    """
    try:
        return main() or 0
    except OlaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted: nothing that was finished is lost; {resume}", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        where = error.filename or "the output folder"
        print(f"error: no space left on the disk of {where}; free some, then {resume}", file=sys.stderr)
        return 2


def human_bytes(count: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB"
