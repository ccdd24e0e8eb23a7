"""A function whose launches a CUDA graph repeats, so that no time goes to Python between kernels: a small
model's training step otherwise waits for the host."""
import torch

EAGER_CALLS = 2  # before a capture: kernels are compiled, which a capture cannot, and gradients exist


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
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = self.function(*inputs)
        self.pool = graph.pool()
        return graph, inputs, outputs
