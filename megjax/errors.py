"""The errors that MegJAX raises at its edges: each names the value, what is allowed and the mend."""


class MegError(ValueError):
    """Bad input. The command line prints it as one line and exits with code 2."""


class WeightsError(MegError):
    """Weights or a model folder that cannot be loaded as they are; nothing is half-loaded."""


class WireFormatError(MegError):
    """A message that is not a valid MegJAX wire-format message."""
