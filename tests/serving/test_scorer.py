import asyncio
import base64
from io import BytesIO

import pytest
from PIL import Image

from serving.refusal import Refusal
from serving.scorer import LineScorer, LoadedLine
from tests.serving.lines import encoded, picture
from wtflow.detector import Verdict
from wtflow.errors import ImageError


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
    png = base64.b64decode(reply.heatmap)
    assert Image.open(BytesIO(png)).size == (200, 120)
    assert b"IDAT\x78\x01" in png, "compressed for size (RFC 1950, FLEVEL), which takes five times as long"


def test_a_photograph_without_a_score_is_refused_and_its_batch_is_not(loaded: dict[str, LoadedLine]) -> None:
    line, first, second = loaded["line-a"], picture(1), picture(2)
    answers = iter([ImageError("not_an_image", "its score is not finite"), *line.detector.verdicts([second])])

    async def judge(seen: Image.Image) -> Verdict | ImageError:
        return next(answers)  # as a replica's batch has them

    scorer = LineScorer(line, judge)
    with pytest.raises(Refusal) as caught:
        asyncio.run(scorer.score(encoded(first), heatmap=False))
    assert (caught.value.status, caught.value.problem.code) == (415, "not_an_image")
    reply = asyncio.run(scorer.score(encoded(second), heatmap=False))
    assert reply.score == line.detector.verdicts([second])[0].score


def test_broken_photograph_never_reaches_the_judge(loaded: dict[str, LoadedLine]) -> None:
    async def judge(seen: Image.Image) -> Verdict:
        raise AssertionError("judged")

    with pytest.raises(Refusal) as caught:
        asyncio.run(LineScorer(loaded["line-a"], judge).score(encoded(picture(1))[:100], heatmap=False))
    assert (caught.value.status, caught.value.problem.code) == (422, "truncated")
