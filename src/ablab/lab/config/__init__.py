"""From a composed config to objects: checked against signatures first, built after; and errors that a person can read.

Only this room, the entry point and `ablab.lab.run` know Hydra and OmegaConf.
"""
