"""What pyproject.toml cannot say yet: the kernels for processors with AVX-512, built where a C++ compiler is at hand.

Optional: without a compiler the package installs and works without them. -fno-ivopts keeps the addresses of a tile's
rows in registers; with it gcc's products reach the processor's peak.
"""

from pathlib import Path

from setuptools import Extension, setup

HERE = Path("src/coatnet/native")
KERNELS = Extension(
    "coatnet.native._kernels",
    sources=[str(HERE / "native.cpp")],
    depends=[str(header) for header in sorted(HERE.glob("*.h"))],
    extra_compile_args=["-O3", "-std=c++20", "-fopenmp", "-fno-ivopts", "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
    extra_link_args=["-fopenmp"],
    optional=True,
)

setup(ext_modules=[KERNELS])
