"""Networks that know nothing of LoRA: one file each, or a package where there is more to them."""
