"""What tests of both GPU backends share: the backends, sizes for each, calls that must not wait, and calls in a CUDA graph."""

from contextlib import contextmanager

import pytest
import torch
from cuda_on_cpu import ORDERS

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def needs_gpu(test):
    """Marks a test or a class of tests that only a GPU can run."""
    return pytest.mark.gpu(needs_cuda(test))


def on(name, *values):
    """A parameter of the fixture `backend`, which may go on with how the host runs it ("cuda shuffled"), marked by the backend."""
    return pytest.param(name, *values, marks=getattr(pytest.mark, name.partition(" ")[0]))


BACKENDS = tuple(map(on, ("triton", "cuda")))
#: For tests whose CUDA threads may run in any order.
ANY_ORDER = tuple(f"cuda {order}" for order in ORDERS)
in_any_order = pytest.mark.parametrize("backend", [on("triton"), *map(on, ANY_ORDER)], indirect=True)


def sizes(names, *, triton, cuda, ways=("cuda",)):
    """Parametrize by `names` with values of each backend's own: the interpreter is slow, and CUDA C++ has more kernels.

    ways: in which CUDA C++ runs each of its own.
    """
    runs = [("triton", triton), *((way, cuda) for way in ways)]
    cases = [on(name, *(values if "," in names else (values,))) for name, mine in runs for values in mine]
    return pytest.mark.parametrize(f"backend,{names}", cases, indirect=["backend"], ids=str)


@contextmanager
def no_wait():
    """Inside, what waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(call):
    """The call as a CUDA graph, after two that compile its kernels, and the tensors that a replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def replays(call):
    """Assert that a call does not wait, and that captured in a CUDA graph it makes the same tensors again."""
    call()
    with no_wait():
        expected = [t.clone() for t in call() if t is not None]
    graph, results = captured(call)
    made = [t for t in results if t is not None]
    for t in made:
        t.zero_()
    graph.replay()
    for actual, wanted in zip(made, expected, strict=True):
        assert torch.equal(actual, wanted)
