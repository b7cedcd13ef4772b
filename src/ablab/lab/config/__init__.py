"""Check composed configs against signatures, build objects from them, and report readable errors.

Only this package, the entry point and `ablab.lab.run` depend on Hydra and OmegaConf.
"""
