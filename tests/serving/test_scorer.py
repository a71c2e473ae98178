import asyncio
import base64
from io import BytesIO

import pytest
from PIL import Image

from serving.refusal import Refusal
from serving.scorer import LineScorer, LoadedLine, verdicts_together
from tests.serving.lines import encoded, picture
from wtflow.detector import Verdict


def test_batch_does_not_change_a_score(loaded: dict[str, LoadedLine]) -> None:
    """Whichever photographs come together, each gets the score that it gets alone."""
    detector = loaded["line-a"].detector
    pictures = [picture(seed) for seed in range(8)]
    alone = [detector.verdicts([one])[0].score for one in pictures]
    for size in (2, 3, 8):
        together = [
            verdict.score
            for start in range(0, len(pictures), size)
            for verdict in verdicts_together(detector, pictures[start : start + size])
        ]
        assert together == pytest.approx(alone, abs=1e-6)


def test_judge_sees_the_small_picture_and_the_heatmap_the_large(loaded: dict[str, LoadedLine]) -> None:
    sizes: list[tuple[int, int]] = []
    detector = loaded["line-a"].detector

    async def judge(seen: Image.Image) -> Verdict:
        sizes.append(seen.size)
        return detector.verdicts([seen])[0]

    original = picture(4, width=200, height=120)
    reply = asyncio.run(LineScorer(loaded["line-a"], judge).score(encoded(original), heatmap=True))
    assert sizes == [(64, 64)]
    assert reply.score == detector.verdicts([original])[0].score
    assert reply.heatmap is not None
    assert Image.open(BytesIO(base64.b64decode(reply.heatmap))).size == (200, 120)


def test_broken_photograph_never_reaches_the_judge(loaded: dict[str, LoadedLine]) -> None:
    async def judge(seen: Image.Image) -> Verdict:
        raise AssertionError("judged")

    with pytest.raises(Refusal) as caught:
        asyncio.run(LineScorer(loaded["line-a"], judge).score(encoded(picture(1))[:100], heatmap=False))
    assert (caught.value.status, caught.value.problem.code) == (422, "truncated")
