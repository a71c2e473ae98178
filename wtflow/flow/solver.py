"""Transport along the field (docs/equations.md, E5)."""

from typing import Annotated

from pydantic import Field

from wtflow.flow.velocity import VelocityField
from wtflow.params import Section
from wtflow.shapes import FeatureMap


class SolverParams(Section):
    """How a sample is carried along the field when it is scored."""

    start: Annotated[float, Field(ge=0, lt=1)]
    """Time at which the field is first asked, at the point (1 - start) x0 of the path: 0 is the paper's, at the
    singularity. For white data the linear part of the field is 0 at 0.5, so that y keeps the distance to the mean."""
    steps: Annotated[int, Field(gt=0)]
    """Euler steps from there to t = 1; each is one evaluation of the network."""


def euler(field: VelocityField, x0_BCHW: FeatureMap, step: float, count: int = 1, start: float = 0.0) -> FeatureMap:
    """y: where `count` Euler steps, together `step` times the way from t = `start` to 1, carry (1 - start) x0, over
    1 - start. For one step y = x0 + step v((1 - start) x0, start).

    (1 - start) x0 is the mean of the path's points at `start` over noise that knows nothing of x0.
    """
    way = 1.0 - start
    x_BCHW = way * x0_BCHW
    for index in range(count):
        t_B = x0_BCHW.new_full((x0_BCHW.shape[0],), start + way * index / count)
        x_BCHW = x_BCHW + (way * step / count) * field(x_BCHW, t_B)
    return x_BCHW / way
