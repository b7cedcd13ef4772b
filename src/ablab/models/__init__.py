"""Architectures: plain `nn.Module`s that are given their norm and know nothing about it."""
