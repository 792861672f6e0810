"""Two players: what each of them minimises (`objectives`), and what keeps the critic smooth (`regularisers`)."""
