"""The four losses of KDFS: cross entropy comes from the host, the other three stand here."""

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 3.0) -> Tensor:
    """Knowledge distillation, `T^2 KL(softmax(t / T) || softmax(s / T))`, mean over the batch (KDFS, Eq. 8).

    Args:
        student_logits (`torch.FloatTensor` of shape `(batch, labels)`): Logits of the masked network.
        teacher_logits (`torch.FloatTensor` of shape `(batch, labels)`): Logits of the teacher.
        temperature (`float`, *optional*, defaults to 3.0): `T`, above 0.

    Returns:
        `torch.FloatTensor` without axes.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def attention_map(features: Tensor) -> Tensor:
    """Where a feature map is active: `normalise(flatten(mean_c x^2))` per image.

    Args:
        features (`torch.FloatTensor` of shape `(batch, channels, height, width)`): A stage's output.

    Returns:
        `torch.FloatTensor` of shape `(batch, height * width)`, rows of length 1.
    """
    return F.normalize(features.float().pow(2).mean(dim=1).flatten(1))  # (batch, height * width)


def reconstruction_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Masked filter modelling of one stage: mean squared difference of the attention maps (KDFS, Eq. 10).

    Args:
        student_features (`torch.FloatTensor` of shape `(batch, channels, height, width)`): After the 1x1 decoder.
        teacher_features (`torch.FloatTensor` of shape `(batch, any, height, width)`): The teacher's stage output.

    Returns:
        `torch.FloatTensor` without axes.
    """
    return (attention_map(student_features) - attention_map(teacher_features)).pow(2).mean()


def flops_loss(macs: Tensor, dense_macs: float, keep_share: float) -> Tensor:
    """Squared miss of the target, `(macs / dense_macs - keep_share)^2` (KDFS, Eq. 7).

    Args:
        macs (`torch.FloatTensor` without axes): Multiply-adds of the sampled masks.
        dense_macs (`float`): Multiply-adds of the whole network.
        keep_share (`float`): Share to keep.

    Returns:
        `torch.FloatTensor` without axes.
    """
    return (macs / dense_macs - keep_share).pow(2).to(torch.float32)
