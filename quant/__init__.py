"""What a bit means: quantizers, the bit vector of a model, training with it, packing it.

spec         BitVector: bits per layer
scheme       which quantizers, by name
layers       which layers of a model can be quantized
attention    the projections of attention as layers
rows         which weights share a scale
codebook     the adaptive weight codebook, pure functions of one layer
activation   learned non-uniform-to-uniform activations, pure functions
kernels      what these compute, as operators with GPU kernels
modules      quantizers as trainable modules: the interface, and ADQ's
baselines    LSQ, N2UQ, APoT, PACT, min-max behind it
flat         all weights of a model in one call
apply        put a bit vector on a model, take it off
fold         BatchNorm into the layer before it
calibrate    input samples, BatchNorm statistics
qat          the training loop
optimizer    what it steps with
distillation what it learns from a teacher
parallel     ranks that train one model together
batchnorm    BatchNorm over their samples
checkpoint   the state of a training in a file
oscillation  weights that flip between levels
progressive  training that comes down to its bits in stages
evaluate     loss and metric with standard error
packing      codes <-> bytes
export       the packed file
batches, files, errors   what the rooms share
"""
