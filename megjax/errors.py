"""The errors that MegJAX raises at its edges: each names the value, what is allowed and the mend."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class MegError(ValueError):
    """Bad input. Programs print it as one line and exit with code 2, see `one_line_errors`."""


class WeightsError(MegError):
    """Weights or a model folder that cannot be loaded as they are; nothing is half-loaded."""


class WireFormatError(MegError):
    """A message that is not a valid MegJAX wire-format message."""


@contextlib.contextmanager
def one_line_errors(program: str = "error") -> Iterator[None]:
    """End the program with one line and code 2 for whatever its user can mend, with code 130 for Ctrl-C.

    Args:
        program: what the line starts with.
    """
    try:
        yield
    except MegError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
