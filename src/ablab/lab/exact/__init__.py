"""Exact resuming for any LightningModule with any data: `Exact`, a callback, and `fit`, a whole training.

from ablab.lab.exact.fit import fit

trainer = lightning.Trainer(max_epochs=10)
fit(trainer, module, data, folder="runs/mine")  # the same line resumes it

"""
