"""Whole networks for inference on CPUs: ``compile``, and the backend "sepconv" of ``torch.compile``.

A call goes ``model`` (arguments, one prepared network per input size) -> ``network`` -> ``instance`` (memory, calls in
order) -> kernels. A network is prepared in stages, each of which hands plain data to the next:

    capture     the model's operations, as a graph
    passes      which of them one kernel computes together
    steps       the graph as a ``program``: steps in order, values with their strides and number types
    layout      where the program's memory lies in one arena; ``slices``: what runs image by image
    lower       which kernel computes each step, asked of ``kernels.backends``
    bind        calls of those kernels in the memory of this process

``prepare`` goes through them and asks ``verify`` whether the result is the model's.
"""

from sepconv.compile.explain import NetworkExplanation as NetworkExplanation
from sepconv.compile.model import CompiledModel as CompiledModel
from sepconv.compile.model import compile as compile
