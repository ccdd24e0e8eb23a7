"""A function whose launches a CUDA graph repeats, so that no time goes to Python between kernels: a small
model's training step otherwise waits for the host."""
import gc

import torch

EAGER_CALLS = 2  # before a capture: kernels are compiled, which a capture cannot, and gradients exist
LONGEST = 32768  # a context; longer steps are not bound by launches, and long enough ones select by a filter


def repeatable(config, length):
    """Can a CUDA graph repeat a training step of a model of this Config on sequences of so many tokens?
    Experts are counted by the host; selectors other than the indexer, which are there to compare, have not
    been tried."""
    return config.n_routed_experts == 0 and config.selector == "indexer" and length <= LONGEST


class Graphed:
    """Calls function(*arguments): tensors, always of the same shapes, or None; -> dict of tensors without
    gradient. Besides, it may add to what exists, such as gradients, and may not wait for the device. From the
    third call on with the same arguments None a CUDA graph repeats it, which keeps the memory that the call
    took. enabled=False: never a graph."""

    def __init__(self, function, enabled=True):
        self.function = function
        self.enabled = enabled
        self.calls = {}  # how many, by which arguments are tensors
        self.captured = {}  # graph, inputs and outputs, by the same
        self.pool = None  # of memory; one graph runs at a time

    def __call__(self, *arguments):
        kind = tuple(x is not None for x in arguments)
        self.calls[kind] = self.calls.get(kind, 0) + 1
        if not self.enabled or self.calls[kind] <= EAGER_CALLS:
            self.captured.clear()  # a graph keeps the memory that this call needs
            self.pool = None
            return self.function(*arguments)
        if kind not in self.captured:
            self.captured[kind] = self.capture(arguments)
        graph, inputs, outputs = self.captured[kind]
        for own, given in zip(inputs, arguments):
            if own is not None:
                own.copy_(given)
        graph.replay()
        return {name: x.clone() for name, x in outputs.items()}

    def capture(self, arguments):
        """-> a graph of the function, and its arguments and results, which stay where they are."""
        inputs = [None if x is None else x.clone() for x in arguments]
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # what is left of an eager call's autograd would bring its stream into the capture
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = self.function(*inputs)
        self.pool = graph.pool()
        return graph, inputs, outputs
