"""Whole networks for inference on CPUs: ``compile``, and the backend "sepconv" of ``torch.compile``.

A call goes ``model`` (arguments, one plan per input size) -> ``plan`` (memory, calls in order) -> kernels. A plan is
made by ``capture`` (the network's operations), ``match`` (which of them one kernel computes together), ``layout``
(where values lie) and ``lower`` (kernels bound to memory).
"""

from sepconv.compile.explain import NetworkExplanation as NetworkExplanation
from sepconv.compile.model import CompiledModel as CompiledModel
from sepconv.compile.model import compile as compile
