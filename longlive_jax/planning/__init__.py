"""`longlive plan`: memory, operations and communication of a run, before a machine is rented."""
