"""What leaves the house.

packed    writes a quantized model at its real low-bit size
loading   reads it
onnx      the same as ONNX; cells: codes of inputs in elementary operations
program   the same by torch.export
policies  bit vectors in the formats of other libraries
"""
