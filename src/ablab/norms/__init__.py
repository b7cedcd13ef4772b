"""Normalization: one `Norm` is what a model receives, and all it ever knows about normalization.

A new norm is one file here (a subclass of `Norm`) and one YAML in conf/norm.
"""

from ablab.norms.batch import BatchNorm
from ablab.norms.norm import Norm, NormLayer, Refused, refusals
from ablab.norms.plain import NoNorm
from ablab.norms.sample import GroupNorm, InstanceNorm, LayerNorm
from ablab.norms.weight import PlainWeight, WeightNorm, WeightReparametrization

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "NoNorm",
    "Norm",
    "NormLayer",
    "PlainWeight",
    "Refused",
    "WeightNorm",
    "WeightReparametrization",
    "refusals",
]
