"""Architectures: plain networks, each a `nn.Module`, that are given their norm and know nothing about it."""
