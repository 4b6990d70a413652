"""What torch would do in many passes, in one: for a CPU with numba, for CUDA with Triton.

Their bytes are those of the codecs in `moe_ckpt.formats`, which say what is computed; nothing here
is needed, and all of it is faster.
"""
