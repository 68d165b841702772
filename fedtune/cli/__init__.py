"""The `fedtune` command: one small module per subcommand."""
