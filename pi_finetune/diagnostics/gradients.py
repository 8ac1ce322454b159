"""Whether two objectives pull an enhancer in the same direction: their expected gradients compared.

Training follows the gradient that an objective has on average over mixtures. If those of two
strategies point the same way, their trainings can differ in little but noise.
"""

import copy
import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats

from pi_finetune.data.loading import UpdateSampler, collate
from pi_finetune.files import json_number
from pi_finetune.results.statistics import percentile_bootstrap
from pi_finetune.seeding import perturbation_rngs

if TYPE_CHECKING:
    from pi_finetune.data.loading import SpeechPairs

__all__ = ["batch_gradients", "gradient_agreement"]


def batch_gradients(
    objective: torch.nn.Module,
    enhancer: torch.nn.Module,
    pairs: "SpeechPairs",
    batches: int = 64,
    batch_size: int = 4,
    seed: int = 0,
    max_norm: float = math.inf,
    device: str = "cpu",
) -> torch.Tensor:
    """An objective's gradient with respect to the enhancer's parameters, batch by batch.

    The batches are the first of a training with this seed: the same crops, mixtures and
    perturbations. The enhancer is not changed.

    Arguments
    ---------
    objective : torch.nn.Module
        ``objective(enhanced, clean, rngs=rngs) -> [B]`` with ``Waveforms``.
    enhancer : torch.nn.Module
    pairs : pi_finetune.data.loading.SpeechPairs
        Of training.
    batches, batch_size, seed
        J, B and the seed of the training. Defaults: 64, 4, 0.
    max_norm : float
        Longer gradients are shortened to it, as training does (``max_grad_norm``); else a few
        batches may outweigh all others. Default: no limit.
    device : str
        Default: cpu.

    Returns
    -------
    torch.Tensor
        [J, P] in float32 on the CPU; P is the number of trainable parameters. With 64 batches
        that is 256 MB for a million parameters.
    """
    objective = objective.to(device).train()
    enhancer = copy.deepcopy(enhancer).to(device).train()
    parameters = [p for p in enhancer.parameters() if p.requires_grad]
    sampler = UpdateSampler(len(pairs), batches * batch_size, seed)
    loader = torch.utils.data.DataLoader(pairs, batch_size, sampler=sampler, collate_fn=collate)
    gradients = []
    for batch in loader:
        batch = batch.to(device)
        rngs = perturbation_rngs(seed, batch)
        loss = objective(enhancer(batch.noisy), batch.clean, rngs=rngs).mean()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = [
            torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)
        ]
        flat = torch.cat([g.flatten() for g in flat]).float()
        gradients.append((flat * (max_norm / flat.norm()).clamp(max=1.0)).cpu())
    return torch.stack(gradients)


def gradient_agreement(
    gradients: dict, seed: int = 0, confidence: float = 0.95, replicates: int = 9999
) -> list[dict]:
    """Cosine of the angle between the expected gradients of every two objectives.

    The inner product of two expectations is estimated without bias by the mean of g_a,i · g_b,j
    over *different* batches i != j, so the noise of single batches, which objectives on the same
    batches share, does not count (a U-statistic: Hoeffding, Ann. Math. Stat. 1948). The cosine is
    that of a and b over the root of those of a and a, and of b and b. 1: the same direction; 0: at
    right angles. As the ratio of estimates it may exceed 1 by chance.

    Arguments
    ---------
    gradients : dict
        ``{objective: [J, P]}``, from :func:`batch_gradients` with equal batches; J >= 3.
    seed, confidence, replicates
        Of the percentile bootstrap over batches.

    Returns
    -------
    list of dict
        For every pair, an objective with itself included: ``objective, other, cosine, low, high,
        signal, batches``. ``signal`` is that of ``objective``, ``|E g|^2 / E |g|^2``: the part of
        one batch's squared gradient that all batches have in common. None stands where noise
        leaves nothing to be estimated.
    """
    names = list(gradients)
    batches = {len(g) for g in gradients.values()}
    if len(batches) != 1 or min(batches) < 3:
        raise ValueError(f"gradients: need equally many batches, 3 or more; got {sorted(batches)}.")
    (batches,) = batches
    # Two objectives at a time: all of them in float64 would be gigabytes.
    gram = np.empty((len(names), len(names), batches, batches))
    for a, name in enumerate(names):
        own = gradients[name].double()
        for b, other in enumerate(names[: a + 1]):
            gram[a, b] = own @ gradients[other].double().T
            gram[b, a] = gram[a, b].T

    def inner(weights):
        """[O, O] from the weights [J] of batches."""
        both = np.einsum("i,abij,j->ab", weights, gram, weights)
        same = np.einsum("i,abii->ab", weights**2, gram)
        with np.errstate(divide="ignore", invalid="ignore"):  # a draw of one batch only: NaN
            return (both - same) / (weights.sum() ** 2 - (weights**2).sum())

    def cosines(products):
        lengths = np.sqrt(np.where(np.diag(products) > 0, np.diag(products), np.nan))
        return products / np.outer(lengths, lengths)

    def resampled(index):
        return cosines(inner(np.bincount(index, minlength=batches).astype(np.float64)))

    whole = inner(np.ones(batches))
    estimate = cosines(whole)
    signal = np.diag(whole) / np.einsum("aaii->a", gram) * batches
    with warnings.catch_warnings():  # where there is only noise, there is no interval
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        rows = (np.arange(batches),)
        drawn = percentile_bootstrap(
            rows, resampled, seed, confidence, replicates, vectorized=False
        )
    return [
        {
            "objective": name,
            "other": other,
            "cosine": json_number(estimate[a, b]),
            "low": json_number(drawn.low[a, b]),
            "high": json_number(drawn.high[a, b]),
            "signal": json_number(max(signal[a], 0.0)),
            "batches": batches,
        }
        for a, name in enumerate(names)
        for b, other in enumerate(names)
        if a <= b
    ]
