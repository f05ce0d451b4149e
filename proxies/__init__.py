"""What a layer is worth and what it costs; nothing here knows about studies.

base      Sensitivity: scores S[layer, bits] with standard errors, in expected loss increase
trace     Hessian trace by Hutchinson probes
gradient  empirical Fisher, from per-sample gradients
costs     average bits, size in bytes, bit operations, latency
latency   seconds of a layer: a roofline, a measured table, or a function
profile   measuring such a table on this machine
"""
