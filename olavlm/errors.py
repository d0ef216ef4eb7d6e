"""The one exception whose message is written for the person at the keyboard."""


class OlaError(ValueError):
    """Bad input: the message names the file, the key, the value found and what was expected.

    Command lines print it as a single line and exit with status 2; it is never raised for a bug of ours.
    """


class Unreadable(OlaError):
    """Something cannot be read here and now (network, disk, mount, too many open files); it may well be undamaged."""
