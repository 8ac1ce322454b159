"""Agreement of gradients: against a plain double loop, known directions, autograd on one batch."""

import numpy as np
import pytest
import torch

from pi_finetune.data.loading import UpdateSampler, collate, load_pairs
from pi_finetune.diagnostics.gradients import batch_gradients, gradient_agreement
from pi_finetune.enhancers import MaskEnhancer
from pi_finetune.objectives import L1STFTLoss, SISDRLoss


def noisy_gradients(directions, batches, noise, seed=0):
    """{name: [J, P]} around known directions; the noise is shared, as that of equal batches is."""
    generator = torch.Generator().manual_seed(seed)
    shared = noise * torch.randn(batches, len(directions[0]), generator=generator)
    return {f"o{i}": direction + shared for i, direction in enumerate(directions)}


def test_it_is_the_plain_double_loop_over_different_batches():
    generator = torch.Generator().manual_seed(0)
    a, b = 1 + torch.randn(2, 6, 9, generator=generator)

    def inner(x, y):
        products = [float(x[i] @ y[j]) for i in range(6) for j in range(6) if i != j]
        return sum(products) / len(products)

    found = gradient_agreement({"a": a, "b": b}, replicates=50)
    assert [(r["objective"], r["other"]) for r in found] == [("a", "a"), ("a", "b"), ("b", "b")]
    expected = inner(a, b) / (inner(a, a) * inner(b, b)) ** 0.5
    assert found[1]["cosine"] == pytest.approx(expected, rel=1e-5)
    energy = float(a.square().sum(1).mean())
    assert found[1]["signal"] == found[0]["signal"] == pytest.approx(inner(a, a) / energy, rel=1e-5)
    assert found[0]["cosine"] == pytest.approx(1.0)


def test_known_directions_are_found_under_noise_that_the_batches_share():
    """The mean's own cosine would be near 1 for any two objectives: they share the noise."""
    east, north = torch.zeros(2, 400)
    east[0] = north[1] = 1.0
    gradients = noisy_gradients([east, north, east + north, -2 * east], batches=64, noise=0.3)
    found = {(r["objective"], r["other"]): r for r in gradient_agreement(gradients, replicates=200)}
    for pair, cosine in {
        ("o0", "o1"): 0.0,
        ("o0", "o2"): 0.5**0.5,
        ("o0", "o3"): -1.0,
        ("o1", "o2"): 0.5**0.5,
    }.items():
        record = found[pair]
        assert record["cosine"] == pytest.approx(cosine, abs=0.25)
        assert record["low"] <= cosine + 0.1 and record["high"] >= cosine - 0.1
    naive = torch.stack([g.mean(0) for g in gradients.values()])
    naive = torch.nn.functional.cosine_similarity(naive[0], naive[1], dim=0)
    assert abs(found["o0", "o1"]["cosine"]) < abs(float(naive))


def test_noise_alone_has_no_direction():
    gradients = noisy_gradients([torch.zeros(50)], batches=5, noise=1.0, seed=1)
    (record,) = gradient_agreement(gradients, replicates=20)
    assert record["cosine"] is None and record["signal"] == 0.0


@pytest.mark.parametrize("batches", [(2, 2), (4, 5)])
def test_too_few_or_unequal_batches_are_refused(batches):
    gradients = {str(i): torch.ones(n, 3) for i, n in enumerate(batches)}
    with pytest.raises(ValueError, match="equally many batches, 3 or more"):
        gradient_agreement(gradients)


def test_batches_are_those_of_training(corpus, noises):
    pairs = load_pairs(corpus, ["train"], "train", noises, seed=3, segment_seconds=0.5)
    torch.manual_seed(0)
    enhancer = MaskEnhancer(channels=(4, 4), dim=8, dilations=(1, 2))
    before = [p.clone() for p in enhancer.parameters()]
    settings = {"batches": 3, "batch_size": 2, "seed": 3}
    found = batch_gradients(SISDRLoss(), enhancer, pairs, **settings)
    assert found.shape == (3, sum(p.numel() for p in before))
    assert all(torch.equal(p, q) for p, q in zip(before, enhancer.parameters(), strict=True))
    addresses = list(UpdateSampler(len(pairs), 6, 3))[2:4]  # the second batch
    batch = collate([pairs[address] for address in addresses])
    lengths = torch.tensor([8000, 8000])
    loss = SISDRLoss()(enhancer(batch.noisy.data, lengths), batch.clean.data, lengths).mean()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in enhancer.parameters()])
    np.testing.assert_allclose(found[1], expected, rtol=1e-4, atol=1e-7)
    shortened = batch_gradients(SISDRLoss(), enhancer, pairs, **settings, max_norm=0.1)
    assert shortened.norm(dim=1).max() <= 0.1 + 1e-6 < found.norm(dim=1).min()
    torch.testing.assert_close(shortened / 0.1, found / found.norm(dim=1, keepdim=True))
    again = batch_gradients(SISDRLoss(), enhancer, pairs, **settings)
    assert torch.equal(found, again)
    assert not torch.allclose(found, batch_gradients(L1STFTLoss(), enhancer, pairs, **settings))
