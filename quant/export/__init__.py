"""What leaves the house: `packed` writes and reads a quantized model at its real low-bit size."""
