"""The losses are those of the papers, and the pool hands out earlier pairs."""

import pytest
import torch
import torch.nn.functional as F

from hf_efficient import Pix2PixDiscriminator
from hf_efficient.pix2pix.losses_pix2pix import ImagePool, discriminator_loss, generator_loss, score_pairs


def test_the_losses_are_those_of_the_papers():
    real, fake = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    ones, zeros, cross = torch.ones_like(real), torch.zeros_like(real), F.binary_cross_entropy_with_logits
    cases = {
        "vanilla": ((cross(real, ones) + cross(fake, zeros)) / 2, cross(fake, ones)),
        "lsgan": ((F.mse_loss(real, ones) + F.mse_loss(fake, zeros)) / 2, F.mse_loss(fake, ones)),
        "hinge": (((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2, -fake.mean()),
    }
    for name, (discriminator, generator) in cases.items():
        torch.testing.assert_close(discriminator_loss(real, fake, name), discriminator)
        torch.testing.assert_close(generator_loss(fake, name), generator)


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_real_and_generated_pairs_share_a_pass_only_where_that_is_exact(norm):
    network = Pix2PixDiscriminator(16, base_channels=4, norm=norm).train()
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    source, real, fake = (torch.randn(2, 3, 16, 16) for _ in range(3))
    scores = score_pairs(network, source, real, (source, fake), one_pass=True)
    assert len(calls) == (2 if norm == "batch" else 1)
    del calls[:]
    apart = score_pairs(network, source, real, (source, fake))
    assert len(calls) == 2, "on a CPU one pass is no faster"
    torch.testing.assert_close(apart, scores, atol=1e-5, rtol=0)
    for score, target in zip(scores, (real, fake)):
        torch.testing.assert_close(score, network(source, target), atol=1e-5, rtol=0)


def test_the_pool_hands_out_earlier_pairs():
    pool, handed = ImagePool(4, seed=1), []
    for number in range(40):
        value = torch.full((1, 1, 1, 1), float(number))
        source, image = pool.query(value, value)
        assert torch.equal(source, image)  # condition and image stay together
        handed.append(int(image))
    assert handed[:4] == [0, 1, 2, 3]
    earlier = [given for number, given in enumerate(handed) if given < number]
    assert 8 <= len(earlier) <= 28
    copy = ImagePool(4)
    copy.load_state_dict(pool.state_dict())
    images = torch.randn(12, 1, 1, 1)
    assert torch.equal(copy.query(images, images)[1], pool.query(images, images)[1])
    smaller = ImagePool(2)
    smaller.load_state_dict(pool.state_dict())
    assert len(smaller.pairs) == 2
    nothing = ImagePool(0)
    assert nothing.query(images, images)[1] is images
