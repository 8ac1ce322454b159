"""On a GPU: the same numbers, streams, devices, no synchronisation, no races."""

import pytest
import torch
from helpers import assert_close, features, value_and_alignment, value_and_gradients

from pi_finetune.soft_dtw import SoftDTW, soft_dtw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU in reach"),
]


@pytest.mark.parametrize("L", [1, 2, 31, 32, 33, 1023, 1024, 1025, 1500, 8192])
@pytest.mark.parametrize("bandwidth", [None, 3])
def test_lengths(L, bandwidth):
    B = 1 if L > 2000 else 3
    cost = torch.rand(B, L, max(1, L - L // 8))
    n = torch.randint(1, L + 1, (B,))
    options = {"gamma": 0.1, "bandwidth": bandwidth}
    got = value_and_alignment(cost.cuda(), n, backend="triton", **options)
    want = value_and_alignment(cost.double(), n, backend="cpu", **options)
    assert_close("loss", got[0].cpu(), want[0], 1e-6)
    assert_close("gradient", got[1].cpu(), want[1], 1e-4)


@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine", "l1"])
@pytest.mark.parametrize("divergence", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_features(cost, divergence, dtype):
    x, y = features(3, 130, 70, dtype=dtype)
    n, m = torch.tensor([130, 64, 65]), torch.tensor([2, 70, 69])
    options = {"gamma": 0.2, "cost": cost, "divergence": divergence}
    got = value_and_gradients(x.cuda(), y.cuda(), n, m, backend="triton", **options)
    want = value_and_gradients(x.double(), y.double(), n, m, backend="cpu", **options)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 1e-2)
    for name, a, b in zip(("loss", "gradient of x", "gradient of y"), got, want):
        assert_close(name, a.cpu(), b, tolerance)


@pytest.mark.parametrize("gamma", [1.0, 0.1, 0.01])
def test_float32_is_exact_at_length(gamma):
    cost = torch.rand(1, 1500, 1400) * 200
    got = value_and_alignment(cost.cuda(), gamma=gamma, backend="triton")
    want = value_and_alignment(cost.double(), gamma=gamma, backend="cpu")
    assert_close("gradient", got[1].cpu(), want[1], 1e-4)


def test_no_host_synchronisation_on_another_stream_in_a_compiled_graph():
    x, y = (z.cuda().requires_grad_() for z in features(2, 100, 90))
    n = torch.tensor([100, 40], device="cuda")
    module = torch.compile(SoftDTW(gamma=0.1, divergence=True), fullgraph=True)
    module(x, y, n).backward()  # compiles
    want, x.grad = x.grad, None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda.set_sync_debug_mode("error")
        try:
            module(x, y, n).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert_close("gradient", x.grad, want, 1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    x, y = (z.to("cuda:1") for z in features(2, 40, 30))
    assert soft_dtw(x, y).device == x.device


def test_1000_repeats_of_more_pairs_than_fit_are_bit_identical():
    x, y = (z.cuda() for z in features(2048, 60, 50))
    want = soft_dtw(x, y, gamma=0.1)
    for _ in range(1000):
        assert torch.equal(soft_dtw(x, y, gamma=0.1), want)


def test_offsets_past_2_to_the_31():
    free = torch.cuda.mem_get_info()[0]
    if free < 30e9:
        pytest.skip(f"needs 30 GB of GPU memory, {free / 1e9:.0f} are free")
    cost = torch.zeros(3, 1 << 15, 1 << 15, device="cuda")
    cost[2, :2, :2] = torch.tensor([[1.0, 9.0], [9.0, 2.0]])
    two = torch.tensor([2, 2, 2])
    from pi_finetune.soft_dtw import soft_dtw_from_cost

    got = soft_dtw_from_cost(cost, two, two, gamma=0.01, backend="triton")
    assert_close("loss", got[2].cpu(), torch.tensor(3.0), 1e-6)
