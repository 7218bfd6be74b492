"""Training steps that a GPU replays: the host cannot launch the kernels of small models as fast as they run."""

import torch


class RecordedSteps:
    """Steps as CUDA graphs on a stream of their own; what a step draws comes from `generator`."""

    def __init__(self, generator):
        self.generator, self.stream, self.graphs = generator, torch.cuda.Stream(generator.device), {}

    def record(self, name, step, warmup=3):
        """Calls `step` a few times, in which kernels are compiled, and records it; returns the calls that counted."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for _ in range(warmup):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, stream=self.stream):
            step()
        self.graphs[name] = graph
        return warmup

    def replay(self, name):
        with torch.cuda.stream(self.stream):
            self.graphs[name].replay()
