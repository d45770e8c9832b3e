"""The one exception that means: the user can mend this."""

_LONGEST = 2000  # characters; names and values in a message come from files, which may hold anything


class DynqError(Exception):
    """A mistake in the input, not in the program.

    The message is one line: what is wrong, where, and what to do. The command line prints it without a stack
    trace and exits with status 2. White space becomes single spaces, and what would steer a terminal is written out.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message[: 2 * _LONGEST].split())
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        super().__init__(line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ...")
