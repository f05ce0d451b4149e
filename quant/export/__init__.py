"""What leaves the house: a quantized model at its real low-bit size.

packed    writes it
loading   reads it
"""
