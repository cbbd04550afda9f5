"""The study on sentences: what trains, how, and what came of it."""
