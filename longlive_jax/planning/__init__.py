"""`longlive plan`: memory, compute and communication of a training run, without a GPU."""
