"""PatchCore's coreset: the greedy k-centre rule, in a loop that the processor can keep up with.

anomalib first projects the patches at random, to 319 numbers if they are 400,000: no gain with 152 channels. Here they
are taken as they are: the same rule on exact distances.
"""

import torch
from torch import Tensor


def k_centre(patches_NC: Tensor, count: int, seed: int) -> Tensor:
    """Indices of `count` patches: a random one, then each time the one farthest from all that are chosen."""
    square_N = patches_NC.square().sum(dim=1)
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(patches_NC), (1,), generator=generator))]
    nearest_N = torch.full_like(square_N, torch.inf)
    for _ in range(count - 1):
        centre_C = patches_NC[chosen[-1]]
        distance_N = (square_N - 2 * (patches_NC @ centre_C)).add_(centre_C.square().sum())
        torch.minimum(nearest_N, distance_N, out=nearest_N)
        nearest_N[chosen[-1]] = -torch.inf
        chosen.append(int(nearest_N.argmax()))
    return torch.tensor(chosen)
