"""The one exception that means: the user can mend this."""


class DynqError(Exception):
    """A mistake in the input, not in the program.

    The message is one line: what is wrong, where, and what to do. The command line prints it without a stack
    trace and exits with status 2.
    """
