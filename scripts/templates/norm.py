"""A norm of your own: power norm, a family that includes RMS norm, as a starting point."""

from __future__ import annotations

from torch import Tensor, nn

from ablab.norms.layer import Layout, NormLayer, Statistic
from ablab.norms.norm import Norm
from ablab.norms.weight import WeightReparametrization, at_least_float32


class Template(Norm):
    """Divides the features of each position by their power mean.

    y = x / (mean(|x|^power) + eps^(power / 2))^(1 / power) · gamma + beta, the mean over the features of a position.
    Power 1 divides by the mean magnitude, 2 is RMS norm with a shift, and the larger the power, the more the largest
    features count.

    To make it yours, change the formula in `normalize` below, then declare in `statistics` which values are averaged:
    checks, docs/norms.md and the expectations of the tests follow from that. An argument of the
    constructor is a key of the YAML, conf/norm/template.yaml.

    Args:
        power: the exponent of the mean, from 1 to 8.
        affine, weight: see `Norm`.
        eps: relative to the mean square, whatever the power.

    Raises:
        ValueError: a power out of range, or an eps that is not above 0.
    """

    def __init__(
        self,
        *,
        power: float = 1.0,
        affine: bool = True,
        eps: float = 1e-5,
        weight: WeightReparametrization | None = None,
    ) -> None:
        super().__init__(affine=affine, eps=eps, weight=weight)
        if not 1 <= power <= 8:  # below 1 a zero has no finite gradient, above 8 float32 overflows
            raise ValueError(f"power={power}: a number from 1 to 8 is needed, for example 2, which is RMS norm")
        self.power = power

    def statistics(self, layout: Layout) -> tuple[Statistic, ...]:
        return (Statistic("power mean", features="all"),)  # batch="the batch", positions=True: also over these

    def layer(
        self,
        num_features: int,
        layout: Layout,
        *,
        num_steps: int | None = None,
        activation: nn.Module | None = None,
    ) -> NormLayer:
        return TemplateLayer(self, num_features, layout, activation=activation)


class TemplateLayer(NormLayer):
    """Divides x by the power mean of its features, then applies gain and shift; see `NormLayer` for the shapes."""

    def __init__(
        self,
        norm: Template,
        num_features: int,
        layout: Layout,
        *,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__(norm, num_features, layout, activation=activation)
        self.power = norm.power

    def normalize(self, x: Tensor, valid: Tensor | None, step: int | None) -> Tensor:
        x = at_least_float32(x)  # at least float32
        mean = x.abs().pow(self.power).mean(self.feature_dim, keepdim=True)
        # a mean that includes steps must leave out those with `valid` False: see `ablab.norms.layer.moments`
        size = (mean + self.eps ** (self.power / 2)).pow(1 / self.power)
        return self.scale_and_shift(x / size)
