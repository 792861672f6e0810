"""Training on many processes: a mesh, a plan that cuts each leaf, and the collectives between two steps."""
