"""The one thing that pyproject.toml has no stable word for: a C file to compile.

Without a compiler the package installs as well; plain PyTorch then does what this file does.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "adq.quant.kernels._counting",
            ["quant/kernels/counting.c"],
            # a product and a sum stay two roundings, as in PyTorch
            extra_compile_args=["-O3", "-ffp-contract=off"],
            optional=True,
        )
    ]
)
