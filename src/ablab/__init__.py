"""ablab: a research template for reproducible ablations.

Importing the package must stay cheap: only the modules that need torch and lightning import them, so that a typo on the
command line is reported within a moment.
"""

__version__ = "0.1.0"

import os

# Must be set before torch is imported. Hides the warning of every process about the cost of `fixed_buckets`.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
