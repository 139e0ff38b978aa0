"""What a generation did, step by step: data, pages, pictures, the terminal."""
