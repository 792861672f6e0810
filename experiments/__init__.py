"""Single-file experiments: the only place where a net and its training meet."""
