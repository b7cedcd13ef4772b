"""Architectures: plain `nn.Module`s that receive their norm as a factory."""
