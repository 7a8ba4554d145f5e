"""The linter of instruction data: `linter` runs it, `rules` and `images` say what is wrong and how bad it is."""
