"""What a bit means: quantizers, the bit vector of a model, training with it, packing it.

spec        BitVector: bits per layer
layers      which layers of a model can be quantized
codebook    the adaptive weight codebook, pure functions
activation  learned non-uniform-to-uniform activations, pure functions
kernels     what activation computes, as operators with GPU kernels
modules     both as trainable modules
apply       put a bit vector on a model, take it off
calibrate   input samples, BatchNorm statistics
qat         the training loop
evaluate    loss and metric with standard error
packing     codes <-> bytes
export      the packed file
batches, files, errors   what the rooms share
"""
