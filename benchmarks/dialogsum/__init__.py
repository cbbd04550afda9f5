"""Ways to fine-tune a language model on DialogSum, side by side: a grid whose cells are stored."""
