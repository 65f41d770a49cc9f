"""The commands, one a room. `reconciler.cli` imports the one that is asked for."""
