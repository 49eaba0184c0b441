"""The subcommands of `wavepath`: arguments in, one room called, a summary out."""
