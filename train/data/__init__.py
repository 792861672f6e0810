"""Data: text and its tokens, images, and the order in which examples come. A batch is a function of key and step."""


class DataError(ValueError):
    """Data cannot be found, read or used; one line that names the file or the value and says what was expected."""
