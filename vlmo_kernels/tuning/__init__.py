"""Which configuration a kernel launch takes: heuristics in the kernels' modules, measured tables, and the tuner."""
