"""Independent dense references: one sample, fp32, loops over the layers of a LLaVA, written from the formulas."""
