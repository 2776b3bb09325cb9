"""Bridges to other people's formats and packages; each module imports what it needs and nothing else does."""
