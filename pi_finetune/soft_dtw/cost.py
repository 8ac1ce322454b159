"""The cost of two frames through matrix products, shared by the fast backends.

Squared Euclidean is |a|^2 + |b|^2 - 2ab. Where features share an offset those terms are large and
nearly cancel, so both sequences are centred on their common mean first: a translation changes no
distance and, as gradients are taken of the same centred expression, no gradient either.
"""

import torch

__all__ = ["centre", "matrix", "unit", "unit_backward", "zero_padding"]


def centre(x: torch.Tensor, y: torch.Tensor, n: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Mean [B, 1, D] over the valid frames of x[b] and y[b] together; padding must be 0."""
    return ((x.sum(1) + y.sum(1)) / (n + m)[:, None].to(x.dtype))[:, None]


def zero_padding(z: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """z [B, L, D] with 0 beyond its lengths [B], whatever was there, NaN included."""
    padding = torch.arange(z.shape[1], device=z.device) >= lengths[:, None]
    return z.masked_fill(padding[..., None], 0.0)


def inverse_norm(z):
    """1 / |z| over the last axis, kept; 0 for a frame of zeros, which has no direction."""
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return torch.where(norm > 0, 1 / norm, 0.0)


def unit(z: torch.Tensor) -> torch.Tensor:
    """Frames scaled to length 1, zeros left as they are."""
    return z * inverse_norm(z)


def unit_backward(grad: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Gradient for z, given that for unit(z): its part along z is lost."""
    scale = inverse_norm(z)
    u = z * scale
    return scale * (grad - u * (grad * u).sum(-1, keepdim=True))


def matrix(
    x: torch.Tensor, y: torch.Tensor, n: torch.Tensor, m: torch.Tensor, cost: str
) -> torch.Tensor:
    """Cost [B, N, M] of padded x [B, N, D] and y [B, M, D]; padding costs something finite."""
    x, y = zero_padding(x, n), zero_padding(y, m)
    if cost == "l1":
        return torch.cdist(x, y, p=1.0)
    if cost == "cosine":
        return 1 - unit(x) @ unit(y).transpose(1, 2)
    mean = centre(x, y, n, m)
    x, y = x - mean, y - mean
    squares = x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None]
    return torch.baddbmm(squares, x, y.transpose(1, 2), alpha=-2).clamp_(min=0)
