"""Kernels for CPUs as Halide pipelines: ``conv`` computes, ``schedule`` knows the machine, ``jit`` makes them callable.

Whatever kind of numbers images are stored in (``numbers``), the kernels compute in float32; those of ``quantized`` in
whole numbers.
"""
