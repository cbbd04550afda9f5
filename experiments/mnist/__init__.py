"""The study on MNIST: a network, its pretraining, and adapters for the digit it knows least."""
