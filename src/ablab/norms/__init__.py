"""Normalization: one `Norm` is what a model receives, and all it ever knows about normalization.

A new norm is one file here (a subclass of `Norm`) and one YAML in conf/norm. What each does is in docs/norms.md.
"""

from ablab.norms.bake import bake
from ablab.norms.batch import BatchNorm
from ablab.norms.dynamic_tanh import DyT
from ablab.norms.evonorm import EvoNormB0, EvoNormS0
from ablab.norms.filter_response import FilterResponseNorm
from ablab.norms.layer import Layout, NormLayer, Refused, Statistic
from ablab.norms.norm import Norm, collecting, own_norms, places
from ablab.norms.plain import NoNorm
from ablab.norms.problems import problems
from ablab.norms.recalibration import recalibrate
from ablab.norms.sample import GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from ablab.norms.weight import PlainWeight, SpectralNorm, WeightNorm, WeightReparametrization, WeightStandardization

__all__ = [
    "BatchNorm",
    "DyT",
    "EvoNormB0",
    "EvoNormS0",
    "FilterResponseNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Layout",
    "NoNorm",
    "Norm",
    "NormLayer",
    "PlainWeight",
    "RMSNorm",
    "Refused",
    "SpectralNorm",
    "Statistic",
    "WeightNorm",
    "WeightReparametrization",
    "WeightStandardization",
    "bake",
    "collecting",
    "own_norms",
    "places",
    "problems",
    "recalibrate",
]
