r"""A Triton backend named `cpu`, so that vLLM's V2 model runner starts in a test without a GPU.

vLLM takes Triton for usable on CPU when a backend of that name exists. Nothing here compiles:
under `TRITON_INTERPRET=1` Triton runs every kernel in Python and NumPy and asks the backend
only for its target and device.

The folder above is a path entry, not a package to install. Found by Triton, it makes vLLM
choose the V2 runner by default and drop the CPU kernels of V1, whether or not the driver says
it is active. So it goes on `PYTHONPATH` for the processes that want it, and for no other:

    PYTHONPATH=tests/support/triton_cpu TRITON_INTERPRET=1 TRITON_DEFAULT_BACKEND=cpu \
        VLLM_USE_V2_MODEL_RUNNER=1 python ...

The `dist-info` folder beside this one carries the entry points by which Triton finds the
backend and vLLM finds `plugin`.
"""
