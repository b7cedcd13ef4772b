"""Normalization layers behind one factory, `Norm`, which is all that a model knows about normalization.

To add a norm, write one file here (a subclass of `Norm`) and one YAML in conf/norm. docs/norms.md describes each norm.
"""

from ablab.norms.bake import bake
from ablab.norms.batch import BatchNorm
from ablab.norms.dynamic_tanh import DyT
from ablab.norms.evonorm import EvoNormB0, EvoNormS0
from ablab.norms.filter_response import FilterResponseNorm
from ablab.norms.layer import Layout, NormLayer, Statistic, UndefinedNorm
from ablab.norms.norm import Norm, builtin_norms, collect_refusals, norm_layers
from ablab.norms.plain import NoNorm
from ablab.norms.problems import find_norm_problems
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
    "SpectralNorm",
    "Statistic",
    "UndefinedNorm",
    "WeightNorm",
    "WeightReparametrization",
    "WeightStandardization",
    "bake",
    "builtin_norms",
    "collect_refusals",
    "find_norm_problems",
    "norm_layers",
    "recalibrate",
]
