"""The studies' own numbers, stored."""
