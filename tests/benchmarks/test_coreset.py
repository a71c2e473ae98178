import torch

from benchmarks.peers.coreset import k_centre


def test_each_choice_is_the_patch_farthest_from_those_before_it() -> None:
    patches_NC = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    chosen = k_centre(patches_NC, 40, seed=1)
    assert len(set(chosen.tolist())) == 40
    for count in range(1, 40):
        nearest_N = torch.cdist(patches_NC, patches_NC[chosen[:count]]).amin(dim=1)
        torch.testing.assert_close(nearest_N[chosen[count]], nearest_N.max(), rtol=1e-4, atol=1e-4)


def test_the_first_is_the_seed_s() -> None:
    patches_NC = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(k_centre(patches_NC, 9, seed=1), k_centre(patches_NC, 9, seed=1))
    assert k_centre(patches_NC, 1, seed=1) != k_centre(patches_NC, 1, seed=2)
