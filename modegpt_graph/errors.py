"""Errors a person can act on: one line each, and the exit code the command line gives it."""


class ModegptError(Exception):
    """The work failed. The message is one line: what was wrong, where, and what to do."""

    exit_code = 1


class InputError(ModegptError):
    """Bad usage or bad input: the caller can mend it."""

    exit_code = 2


class OverflowedActivations(ModegptError):
    """What a model computes is not finite: another number format may mend it."""

    exit_code = 2
