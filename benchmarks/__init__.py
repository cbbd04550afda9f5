"""What adapters cost, measured on the compiled programs."""
