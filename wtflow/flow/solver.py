"""Transport along the field (docs/equations.md, E5)."""

from wtflow.flow.velocity import VelocityField
from wtflow.shapes import FeatureMap


def euler(field: VelocityField, x0_BCHW: FeatureMap, step: float, count: int = 1, start: float = 0.0) -> FeatureMap:
    """Where `count` Euler steps, together of size `step`, carry x0. One step is one network evaluation.

    The field is asked at times from `start` on, evenly towards 1, and at `start` for x0 itself: data are not mixed with
    noise first. A start above 0 reads the field a little behind its singularity. `step` is not shortened by it.
    """
    x_BCHW = x0_BCHW
    for index in range(count):
        t_B = x0_BCHW.new_full((x0_BCHW.shape[0],), start + (1 - start) * index / count)
        x_BCHW = x_BCHW + (step / count) * field(x_BCHW, t_B)
    return x_BCHW
