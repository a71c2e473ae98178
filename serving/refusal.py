"""Every way in which the service says no: a status for machines, a remedy for people."""

from serving.schema import ErrorReply, Problem
from wtflow.errors import ImageError

FORMATS = "PNG, JPEG, BMP, TIFF or WebP"
HOW_TO_SEND = "Send the file's bytes as the body: curl --data-binary @photo.png <url>"

IMAGE_STATUS = {
    "empty": 422,
    "not_an_image": 415,
    "truncated": 422,
    "too_small": 422,
    "too_many_bytes": 413,
    "too_many_pixels": 413,
}
IMAGE_REMEDY = {
    "empty": HOW_TO_SEND,
    "not_an_image": f"Send a {FORMATS} file of 8 or 16 bits a channel.",
    "truncated": "Send the whole file; compare its size with the original's. With curl: --data-binary, not -d.",
    "too_small": "Send a larger photograph.",
    "too_many_bytes": "Save the photograph smaller, for instance as JPEG.",
    "too_many_pixels": "Scale the photograph down first; the model sees it at a few hundred pixels anyway.",
}


class Refusal(Exception):  # noqa: N818
    """A request that gets no result. Travels between processes as a value."""

    def __init__(self, status: int, code: str, message: str, remedy: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status, self.problem = status, Problem(code=code, message=message, remedy=remedy)

    def __reduce__(self) -> tuple[type["Refusal"], tuple[int, str, str, str]]:
        return Refusal, (self.status, self.problem.code, self.problem.message, self.problem.remedy)

    @property
    def reply(self) -> ErrorReply:
        """The reply's body."""
        return ErrorReply(error=self.problem)


def of_image(error: ImageError) -> Refusal:
    """What an undecodable photograph means over HTTP."""
    return Refusal(IMAGE_STATUS[error.reason], error.reason, str(error), IMAGE_REMEDY[error.reason])


def unknown_line(line: str, known: list[str]) -> Refusal:
    """404: the path names a line that is not served."""
    remedy = f"Served here: {', '.join(known)}. A new line appears after `dvc repro` and a restart."
    return Refusal(404, "unknown_line", f"no line {line!r}", remedy)


def not_ready(lines: list[str]) -> Refusal:
    """503: models that are not loaded, or whose process does not answer."""
    remedy = "Wait and try again; GET /readyz answers 200 when every line is loaded."
    return Refusal(503, "line_not_ready", f"not ready: {', '.join(lines)}", remedy)


def overloaded(line: str) -> Refusal:
    """503: the queue of the line is full."""
    remedy = "Try again in a second, with fewer requests at once; more replicas a line: WTFLOW_SERVE_REPLICAS."
    return Refusal(503, "overloaded", f"too many requests wait for {line}", remedy)


def too_many_bytes(limit: int) -> Refusal:
    """413: the body is longer than the service reads."""
    message = f"the body is longer than {limit} bytes"
    return Refusal(413, "too_many_bytes", message, IMAGE_REMEDY["too_many_bytes"])


def slow_body(seconds: float) -> Refusal:
    """408: the body did not come in time."""
    message = f"the whole body was not here after {seconds:g} s"
    return Refusal(
        408, "slow_body", message, "Send it again, smaller or over a faster line; WTFLOW_SERVE_BODY_TIMEOUT_S."
    )


def unsupported_content_type(found: str) -> Refusal:
    """415: the body is declared to be something that is not the bytes of one image."""
    message = f"Content-Type {found!r} is not the bytes of an image"
    return Refusal(415, "unsupported_content_type", message, f"{HOW_TO_SEND} ({FORMATS}).")


def internal() -> Refusal:
    """500: a fault of the service."""
    remedy = "Try once more; if it stays, the service's log says why. Scoring changes nothing, so a retry is safe."
    return Refusal(500, "internal", "the service failed", remedy)
