import numpy as np
import pytest
import torch
from PIL import Image

from wtflow.scoring.anomaly_map import enlarge, heatmap, overlay


def test_enlarging_keeps_corners_and_linear_maps() -> None:
    ramp = torch.arange(4.0).view(1, 1, 4) + 10 * torch.arange(3.0).view(1, 3, 1)
    large = enlarge(ramp, (9, 13))
    wanted = torch.linspace(0, 3, 13).view(1, 1, 13) + torch.linspace(0, 20, 9).view(1, 9, 1)
    torch.testing.assert_close(large, wanted, rtol=0, atol=1e-4)


def test_the_same_energy_has_the_same_colour_in_every_image() -> None:
    """The scale is the line's: it does not stretch to the highest energy of the image at hand."""
    calm = np.full((4, 4), 0.5, np.float32)
    wild = calm.copy()
    wild[0, 0] = 50.0
    first, second = heatmap(calm, (40, 40), 1.0), heatmap(wild, (40, 40), 1.0)
    assert np.array_equal(first[20:, 20:], second[20:, 20:])
    assert not np.array_equal(first[0, 0], second[0, 0])


@pytest.mark.parametrize("threshold", [0.1, 1.0, 7.5])
def test_blue_at_zero_yellow_at_the_threshold_red_from_twice_on(threshold: float) -> None:
    colours = {
        share: heatmap(np.full((2, 2), share * threshold, np.float32), (2, 2), threshold)[0, 0].tolist()
        for share in (0.0, 1.0, 2.0, 30.0)
    }
    assert colours == {0.0: [29, 53, 87], 1.0: [241, 196, 83], 2.0: [170, 20, 30], 30.0: [170, 20, 30]}


def test_heatmap_has_the_size_asked_for() -> None:
    picture = heatmap(np.random.default_rng(0).random((4, 6), dtype=np.float32), (30, 50), 0.5)
    assert (picture.shape, picture.dtype) == ((30, 50, 3), np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_overlay_has_the_size_of_its_photograph(mode: str) -> None:
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53), dtype=np.uint8)).convert(mode)
    laid = overlay(photograph, np.ones((4, 4), np.float32), 1.0)
    assert (laid.size, laid.mode) == ((53, 37), "RGB")


def test_overlay_covers_more_where_the_energy_is_higher() -> None:
    energies = np.zeros((2, 2), np.float32)
    energies[:, 1] = 2.0
    black = np.asarray(overlay(Image.new("RGB", (20, 20)), energies, 1.0))
    white = np.asarray(overlay(Image.new("RGB", (20, 20), "white"), energies, 1.0))
    shines_through = (white.astype(int) - black).mean(axis=2)
    assert shines_through[0, 0] == pytest.approx(0.9 * 255, abs=1)
    assert shines_through[0, -1] == pytest.approx(0.4 * 255, abs=1)
