"""Transport along the field (docs/equations.md, E5)."""

from wtflow.flow.velocity import VelocityField
from wtflow.shapes import FeatureMap


def euler(field: VelocityField, x0_BCHW: FeatureMap, step: float, count: int = 1) -> FeatureMap:
    """Where `count` Euler steps of size step / count carry x0, from t = 0. One step is one network evaluation."""
    x_BCHW = x0_BCHW
    for index in range(count):
        t_B = x0_BCHW.new_full((x0_BCHW.shape[0],), index / count)
        x_BCHW = x_BCHW + (step / count) * field(x_BCHW, t_B)
    return x_BCHW
