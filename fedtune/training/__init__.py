"""Training on a client's machine: models, data, the one loop, evaluation. torch lives here and nowhere else."""
