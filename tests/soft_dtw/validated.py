"""One launch of every kernel, for `python -m ttsem.validate`: the module that each compiler pass
receives is executed, and the first pass that changes the result is named. See `make kernels`."""

import torch

from pi_finetune.soft_dtw import soft_dtw, triton


def main(device="cpu"):
    triton.INTERPRETED = True  # takes CPU tensors
    triton._fast_log = lambda tensor: False
    torch.manual_seed(0)
    x, y = (torch.rand(1, L, 3).requires_grad_() for L in (3, 2))
    soft_dtw(x, y, gamma=0.3, backend="triton").sum().backward()
