"""The nouns and the numerics that every room shares."""
