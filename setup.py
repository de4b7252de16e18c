"""Package metadata. The project runs from its checkout: installing it brings what it needs, not its code.

A package on the Python index is called `kernels` too, so ours is never installed over it.
"""

from setuptools import setup

setup(
    name="golfmodel",
    version="0.1.0",
    description="Train the best language model whose code and weights fit in 16,000,000 bytes",
    license="MIT",
    python_requires=">=3.10",
    packages=[],
    py_modules=[],
    install_requires=[
        "torch>=2.9",
        "triton>=3.5; platform_system == 'Linux'",
        "numpy>=1.26",
        "sentencepiece>=0.2.2",
        "zstandard>=0.22",
        "safetensors>=0.4.3",
        "tqdm>=4.64",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-benchmark>=5.3", "hypothesis>=6.100", "ruff>=0.14"],
        "data": ["huggingface_hub>=0.30"],
        "plot": ["matplotlib>=3.8"],
    },
)
