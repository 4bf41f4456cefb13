"""The one exception of this package for data that is damaged, incomplete or unsuitable."""


class DataError(ValueError):
    """The message names the file or sample, says what is wrong with it, and what to do next."""
