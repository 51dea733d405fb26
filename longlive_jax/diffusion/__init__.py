"""Flow matching: noise levels, solvers and guidance, as pure functions of arrays."""
