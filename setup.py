"""Packaging: what is installed, for which Python, and what the extras install."""
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1 it was wheel's
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:
        bdist_wheel = None

ROOT = Path(__file__).resolve().parent


def version():
    """Return the version in local_attention/__init__.py. It is read as text, because an import would need MindSpore."""
    source = (ROOT / "local_attention" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', source, re.MULTILINE).group(1)


TRAIN = ["tqdm", "matplotlib"]
TEST = ["pytest>=7", "pytest-xdist>=3", "onnx", "onnxruntime", *TRAIN]

# It is built for every machine of one architecture. When the kernel runs, it checks for wider vectors. If it cannot be
# built, the package works without it.
NATIVE = Extension(
    "local_attention.backends.native._native",
    sources=["local_attention/backends/native/src/native.cpp"],
    depends=[str(header.relative_to(ROOT)) for header in sorted(ROOT.glob("local_attention/backends/native/src/*.h"))],
    extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-pthread",
                        "-fno-wrapv"],  # Python's own flags have -fwrapv, which loops over int pay for
    extra_link_args=["-pthread"],
    language="c++",
    optional=True,
)



class BuildKernel(build_ext):
    """Names the kernel without a Python version: it has a plain C interface and is loaded as a library."""

    def get_ext_filename(self, name):
        return str(Path(*name.split(".")).with_suffix(".so"))


COMMANDS = {"build_ext": BuildKernel}
if bdist_wheel is not None:
    class AnyPython(bdist_wheel):
        """Tags the wheel for every Python, because nothing in it depends on the version."""

        def get_tag(self):
            return "py3", "none", super().get_tag()[2]
    COMMANDS["bdist_wheel"] = AnyPython

setup(
    name="local-attention-mindspore",
    version=version(),
    description="Local (windowed) attention for MindSpore: a port of the PyTorch package local-attention",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    keywords=["attention", "local attention", "sliding window", "transformer", "language model", "mindspore"],
    packages=find_packages(include=["local_attention", "local_attention.*"]),
    ext_modules=[NATIVE],
    cmdclass=COMMANDS,
    python_requires=">=3.9,<3.13",
    # The oldest MindSpore that the tests were run with. MindSpore's wheels allow NumPy 2 but do not work with it.
    install_requires=["mindspore>=2.7.0", "numpy>=1.25,<2", "safetensors>=0.4"],
    extras_require={"train": TRAIN, "test": TEST, "dev": [*TEST, "ruff"]},
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
