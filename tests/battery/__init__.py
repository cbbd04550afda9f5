"""Layouts × ops × options × transforms: each pair of them, or all, against the dense weight."""
