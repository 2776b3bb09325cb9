"""The error of the data layer."""


class DataError(ValueError):
    """A file or a row that cannot be used, in one line that says where it is and what was expected."""
