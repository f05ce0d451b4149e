"""Operators with a kernel of their own.

ops        the custom operators, and which implementation serves which device
reference  what they compute, in plain PyTorch
n2uq       Triton kernels of the activation quantizer
"""
