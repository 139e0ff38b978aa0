"""Which slots of a window a network call reveals, and by which logits."""
