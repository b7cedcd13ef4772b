"""Tasks: LightningModules that add to a model its loss, its metrics and its optimizer."""
