"""Threads of the CPU backend: PyTorch's own where its OpenMP library is known, else Python's."""

import multiprocessing
import threading
import time

import pytest
import torch

from pi_finetune.soft_dtw import cpu, soft_dtw


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["OpenMP", "Python"])
def kind(request, monkeypatch):
    if request.param == "Python":
        monkeypatch.setattr(cpu, "_openmp", lambda: None)
    elif cpu._openmp() is None:
        pytest.skip("this PyTorch does not run on an OpenMP library with GOMP_parallel")
    return request.param


def value_and_gradient():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(7, length, 5, generator=generator) for length in (130, 90))
    x.requires_grad_()
    value = soft_dtw(x, y, gamma=0.1, divergence=True, backend="cpu")
    value.sum().backward()
    return value.detach(), x.grad


def test_values_are_those_of_one_thread(kind):
    found = value_and_gradient()
    torch.set_num_threads(1)
    for a, b in zip(found, value_and_gradient()):
        assert torch.equal(a, b)


def test_every_item_is_run_once_by_two_threads(kind):
    seen = []

    def run(b):
        time.sleep(0.02)  # without the GIL, so that both come to run some
        seen.append((b, threading.get_ident()))
        return b * b

    assert cpu._for_each(9, lambda: run) == [b * b for b in range(9)]
    assert sorted(b for b, _ in seen) == list(range(9)) and len({who for _, who in seen}) == 2


@pytest.mark.parametrize("failing", ["caller", "helper"])
def test_an_error_in_any_thread_reaches_the_caller(kind, failing):
    me = threading.get_ident()

    def run(b):
        time.sleep(0.02)
        if (threading.get_ident() == me) == (failing == "caller"):
            raise KeyboardInterrupt(f"of the {failing}")

    with pytest.raises(KeyboardInterrupt, match=f"of the {failing}"):
        cpu._for_each(9, lambda: run)
    assert torch.get_num_threads() == 2


def _child(queue):
    # PyTorch would fill large new tensors by threads of its own, and wait for ever.
    torch.utils.deterministic.fill_uninitialized_memory = False
    queue.put([tensor.tolist() for tensor in value_and_gradient()])


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="no processes can be forked here"
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_threads_that_it_lacks(kind):
    want = value_and_gradient()  # the parent's threads are there
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    try:
        found = queue.get(timeout=60)
    finally:
        child.kill()
        child.join()
    assert found == [tensor.tolist() for tensor in want]
