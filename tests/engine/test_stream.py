"""What a CPU answers at once, and what a thread is told of a GPU that computes on."""

import threading

import pytest
import torch

from disaggd.engine.stream import DeviceStream

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_a_cpu_has_computed_what_it_was_asked_for() -> None:
    stream = DeviceStream(torch.device("cpu"))
    stream.enter()
    assert stream.mark()()


@needs_gpu
def test_a_mark_comes_true_when_the_gpu_has_come_so_far() -> None:
    stream = DeviceStream(torch.device("cuda", 0))
    stream.enter()
    before = stream.mark()
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**9)  # cycles: a second
    after = stream.mark()
    assert before() and not after()
    torch.cuda.synchronize()
    assert after()


@needs_gpu
def test_another_thread_asks_without_waiting() -> None:
    stream = DeviceStream(torch.device("cuda", 0))
    stream.enter()
    torch.cuda._sleep(2 * 10**9)
    is_done = stream.mark()
    seen: list[bool] = []

    def ask() -> None:
        seen.append(is_done())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [False]
    torch.cuda.synchronize()
    assert is_done()
