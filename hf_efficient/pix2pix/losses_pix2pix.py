"""The adversarial objectives (arXiv 1611.07004, Eq. 1 to 4) and the pool of earlier outputs."""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


GAN_LOSSES = ("vanilla", "lsgan", "hinge", "none")


class ImagePool:
    """Earlier outputs, drawn at random, so that the discriminator does not forget them (Shrivastava et al., 2017).

    Args:
        size (`int`): Pairs kept; 0 = every pair is handed back as it came.
        seed (`int`): Seed of the draws.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.pairs, self.random = size, [], random.Random(seed)

    def query(self, source: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Hand pairs in and others out: half of the time an earlier one that the new one replaces.

        Args:
            source (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Conditions.
            output (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Generated images.

        Returns:
            `tuple[torch.FloatTensor, torch.FloatTensor]`: As many conditions and images.
        """
        if self.size == 0:
            return source, output
        chosen = []
        for pair in zip(source.detach().clone(), output.detach().clone()):
            if len(self.pairs) < self.size:
                self.pairs.append(pair)
                chosen.append(pair)
            elif self.random.random() < 0.5:
                place = self.random.randrange(self.size)
                chosen.append(self.pairs[place])
                self.pairs[place] = pair
            else:
                chosen.append(pair)
        return torch.stack([pair[0] for pair in chosen]), torch.stack([pair[1] for pair in chosen])

    def state_dict(self) -> dict[str, Any]:
        """Return the pairs and the state of the draws, as tensors and plain values."""
        version, numbers, gauss = self.random.getstate()
        return {"pairs": [list(pair) for pair in self.pairs], "random": [version, list(numbers), gauss]}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Continue where [`~ImagePool.state_dict`] was taken; a smaller pool keeps the first pairs.

        Args:
            state (`dict`): What it returned.
            device (`torch.device` or `str`, defaults to `"cpu"`): Where the pairs are kept.
        """
        self.pairs = [tuple(image.to(device) for image in pair) for pair in state["pairs"][: self.size]]
        version, numbers, gauss = state["random"]
        self.random.setstate((version, tuple(numbers), gauss))


def discriminator_loss(real: Tensor, fake: Tensor, gan_loss: str) -> Tensor:
    """Half the loss on real plus half the loss on generated pairs (paper, Sec. 3.3 halves it, too).

    Args:
        real (`torch.FloatTensor` of shape `(batch, 1, height, width)`): Scores of real pairs.
        fake (`torch.FloatTensor` of shape `(batch, 1, height, width)`): Scores of generated pairs.
        gan_loss (`str`): `"vanilla"`, `"lsgan"` or `"hinge"`.

    Returns:
        `torch.FloatTensor` of shape `()`: The loss to minimise.
    """
    if gan_loss == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if gan_loss == "lsgan":
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor, gan_loss: str) -> Tensor:
    """Loss of a generator that wants its pairs to look real.

    Args:
        fake (`torch.FloatTensor` of shape `(batch, 1, height, width)`): Scores of generated pairs.
        gan_loss (`str`): `"vanilla"` (-log D, Sec. 3.3), `"lsgan"` or `"hinge"`.

    Returns:
        `torch.FloatTensor` of shape `()`: The loss to minimise.
    """
    if gan_loss == "hinge":
        return -fake.mean()
    return (fake - 1).square().mean() if gan_loss == "lsgan" else F.softplus(-fake).mean()


def score_pairs(
    discriminator: nn.Module,
    source: Tensor,
    target: Tensor,
    fakes: tuple[Tensor, Tensor],
    one_pass: bool | None = None,
) -> tuple:
    """Score real and generated pairs, in one pass where that is exact and faster.

    Instance norm treats each image alone, so both halves may share a batch; batch norm would mix their statistics. A
    CPU is no faster with the larger batch: `train_step_share` of `examples/pix2pix_benchmark.py`.

    Args:
        discriminator ([`Pix2PixDiscriminator`], also wrapped): The network.
        source (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Conditions of the real pairs.
        target (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Real images.
        fakes (`tuple[torch.FloatTensor, torch.FloatTensor]`): Conditions and images of the generated pairs.
        one_pass (`bool`, *optional*): Whether both share a pass where it is exact; left out, unless on a CPU.

    Returns:
        `tuple[torch.FloatTensor, torch.FloatTensor]`: Scores of real and of generated pairs.
    """
    norm = getattr(discriminator, "module", discriminator).norm
    if one_pass is None:
        one_pass = source.device.type != "cpu"
    if norm == "batch" or not one_pass:
        return discriminator(source, target), discriminator(*fakes)
    scores = discriminator(torch.cat([source, fakes[0]]), torch.cat([target, fakes[1].to(target.dtype)]))
    return scores[: len(source)], scores[len(source) :]
