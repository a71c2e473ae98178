"""The regression that trains the field (docs/equations.md, E4)."""

from wtflow.flow.path import PathSample
from wtflow.flow.velocity import VelocityField
from wtflow.shapes import ImageScores


def matching_loss(field: VelocityField, sample: PathSample) -> ImageScores:
    """Conditional flow matching: mean square over C, H, W of field(x_t, t) - velocity, one value an image."""
    error_BCHW = field(sample.x_BCHW, sample.t_B) - sample.velocity_BCHW
    return error_BCHW.square().mean(dim=(1, 2, 3))
