"""The one exception a user is meant to read."""


class UserError(Exception):
    """A mistake that the user can correct: its text names the field or file, the value, and what would work.

    `launch.py` prints the text as one line and exits with status 2; library users catch it by this name.
    """
