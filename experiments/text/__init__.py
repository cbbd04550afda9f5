"""The study on sentences: what trains, how, and how well it does."""
