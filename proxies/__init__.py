"""What a layer is worth and what it costs; nothing here knows about studies.

base      what a proxy is asked and what it answers: S[layer, bits], in expected loss increase
work      a measurement in parts: several devices, interruptions
memory    batches that do not fit, activation checkpoints
gradient  Gauss-Newton, Fisher and output-gradient scores, one backward pass a batch
trace     Hessian traces of all layers at once, large eigenvalues taken out
direct    loss or divergence measured with one layer quantized
replay    running a model again from a layer on
pairwise  what two layers lose together
ensemble  one score out of several, fitted on measured results
costs     average bits, size in bytes, bit operations, latency
ties      layers that must share their bits
latency   seconds of a layer: a roofline, a measured table, or a function
profile   measuring such a table on this machine
"""
