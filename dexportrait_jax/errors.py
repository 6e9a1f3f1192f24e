"""The one kind of error that is meant for people rather than for a debugger."""


class UserError(Exception):
    """Something the user can put right: one line that says what is wrong, where, and what to do.

    The command line prints the message without a traceback and ends with a non-zero code.
    """
