"""ablab: a research template for reproducible ablations.

Importing the package is cheap on purpose: torch and lightning are loaded by the modules that need them,
so that a typo on the command line is answered before they are.
"""

__version__ = "0.1.0"

import os

# Read when torch is imported. Its C++ warns each process of what `fixed_buckets` costs; errors are still printed.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
