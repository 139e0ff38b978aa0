"""Mathematics, code, puzzles and facts: how they are asked and marked."""
