"""Short, plain versions for learners, each tested equal to the full one."""
