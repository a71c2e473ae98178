import pickle

from serving import refusal
from wtflow.errors import ImageError


def test_travels_between_processes() -> None:
    """Ray moves a refusal from a line's process to the gateway's."""
    sent = refusal.of_image(ImageError("too_many_pixels", "9 x 9 pixels"))
    got = pickle.loads(pickle.dumps(sent))  # noqa: S301
    assert (got.status, got.reply) == (413, sent.reply)
    assert got.reply.error.message == "9 x 9 pixels"


def test_every_reason_of_an_image_error_has_a_status_and_a_remedy() -> None:
    reasons = {"empty", "not_an_image", "truncated", "too_many_bytes", "too_many_pixels", "too_small"}
    assert all(reason in (ImageError.__doc__ or "") for reason in reasons)
    assert set(refusal.IMAGE_STATUS) == set(refusal.IMAGE_REMEDY) == reasons
