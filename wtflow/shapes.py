"""Axis legend. A tensor's name ends in its axes, in order: `x_BCHW`.

B  images of a batch            C  feature channels
H  rows of the feature map      W  columns of the feature map
Y  rows of the image            X  columns of the image
N  images of a whole split      L  backbone levels, from fine to coarse
"""

from jaxtyping import Float
from torch import Tensor

FeatureMap = Float[Tensor, "B C H W"]
"""Features, noise, velocities: one vector of C channels for each of the H x W places of an image."""
Times = Float[Tensor, "B"]
"""One time in [0, 1] an image: 0 is the data, 1 the noise."""
AnomalyMap = Float[Tensor, "B H W"]
"""Anomaly energy for each place: 0 at the bottom of the well, unbounded above."""
ImageScores = Float[Tensor, "B"]
