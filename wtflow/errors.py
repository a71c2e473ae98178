"""What went wrong, said to the person who can mend it."""


class WTFlowError(Exception):
    """A mistake outside the code. The message names the file, the field and the remedy; no traceback is needed."""


class ImageError(WTFlowError):
    """An image that cannot be scored or learnt from.

    `reason` is a stable word for tables and status codes: `empty`, `not_an_image`, `truncated`, `too_many_bytes`,
    `too_many_pixels`, `too_small`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return ImageError, (self.reason, str(self))


class DigestError(WTFlowError):
    """A file whose bytes are not the bytes that were recorded for it."""
