"""What leaves the house: `packed` writes a quantized model at its real low-bit size, `loading` reads it."""
