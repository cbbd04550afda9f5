"""What takes part in the comparisons with PyTorch; each contender runs in a process of its own."""
