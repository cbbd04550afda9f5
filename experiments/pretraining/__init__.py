"""Pretraining of a small encoder-decoder: its vocabulary, and texts with gaps to fill."""
