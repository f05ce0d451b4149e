"""Operators with kernels of their own, for every device and tracer.

library            where they are registered
n2uq_ops           activations: forward and backward
weights_ops        weights of all layers: forward and backward; the codebooks' step
inputs_ops         inputs of layers that are not trained any more
packed_ops         linear and convolution layers over packed weights
*_reference        what they compute, in plain PyTorch: the CPU's way
counting           the search of codes on a CPU: counting.c, or plain PyTorch without it
n2uq, weights, codebooks, inputs, packed_vector, packed_matrix, packed_words   Triton kernels
aot                compiles every kernel without a GPU
"""
