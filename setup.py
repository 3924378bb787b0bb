"""Packaging of hf_efficient: core requirements, one extra per part, the command and Optimum's plug-in."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "hf_efficient" / "__init__.py").read_text(), re.M)[1]

CORE = [
    "torch>=2.9",
    "transformers>=5.23,<6",
    "accelerate>=1.10",
    "huggingface-hub>=1.0",
    "safetensors>=0.6",
    "numpy>=2.0",
    "pillow>=11.0",
    "peft>=0.18",
    "datasets>=4.0",
    "evaluate>=0.4.6",
    "optimum>=2.0",
]

EXTRAS = {
    # torchvision and timm replace a CPU build of torch by the index's default build: never core requirements.
    "vision": ["torchvision", "timm>=1.0.20", "scipy"],
    "kdfs": ["torch-pruning>=1.6", "matplotlib>=3.8"],
    "pix2pix": ["opencv-python-headless>=4.9", "scikit-image>=0.24", "torchmetrics>=1.6", "matplotlib>=3.8"],
    "onnx": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20"],
    "quickstart": [
        "easy-vqa",
        "matplotlib>=3.8",
        "scikit-learn>=1.5",
        "scikit-image>=0.24",
        "opencv-python-headless>=4.9",
    ],
    "demo": [
        "gradio>=6.0",
        "easy-vqa",
        "scikit-learn>=1.5",
        "scikit-image>=0.24",
        "opencv-python-headless>=4.9",
    ],
}
EXTRAS["test"] = sorted(
    {requirement for name in EXTRAS for requirement in EXTRAS[name]}
    | {"pytest>=8.0", "pytest-timeout", "pytest-xdist", "coverage>=7.0", "pyyaml", "selenium>=4.20", "ruff==0.17.6"}
)
EXTRAS["dev"] = [*EXTRAS["test"], "pre-commit>=4.0"]

setup(
    name="hf-efficient",
    version=VERSION,
    description="Four published efficiency methods as first-class citizens of the Hugging Face ecosystem",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_namespace_packages(include=["hf_efficient", "hf_efficient.*"], exclude=["hf_efficient.optimum_cli"]),
        "optimum.commands.register",  # a namespace that Optimum's command reads; the folder has no __init__.py
    ],
    package_dir={"optimum.commands.register": "hf_efficient/optimum_cli"},
    package_data={"hf_efficient": ["py.typed"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hf-efficient=hf_efficient.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
