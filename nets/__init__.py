"""The zoo: one file a network; imports core only."""
