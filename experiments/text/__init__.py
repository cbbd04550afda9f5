"""The parts of the study on texts: what trains, how, and what came of it."""
