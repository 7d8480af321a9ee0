"""Halide pipelines for CPUs: one file per operation, each an algorithm and a schedule.

``machine`` knows the processor, ``schedule`` turns a shape into loop sizes, ``runtime`` compiles and calls.
Kernels take and return plain tensors; they know nothing of autograd, modules or PyTorch's dispatcher.
"""
