"""The errors of the data layer."""


class DataError(ValueError):
    """A file or a row that cannot be used, in one line that says where it is and what was expected."""


class PromptError(DataError):
    """A conversation that cannot become a prompt.

    Attributes:
        kind: what `LeftOut` counts it as.
    """

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self):  # processes send them to each other
        return type(self), (str(self), self.kind)


class PromptTooLong(PromptError):
    """A prompt with more tokens than were allowed."""
