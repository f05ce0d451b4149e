"""Operators with kernels of their own, for every device and tracer.

library            where they are registered
n2uq_ops           activations: forward and backward
weights_ops        weights of all layers: forward and backward; the codebooks' step
n2uq_reference, weights_reference   what they compute, in plain PyTorch: the CPU's way
n2uq, weights, codebooks            Triton kernels
aot                compiles every kernel without a GPU
"""
