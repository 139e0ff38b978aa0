"""One file for each published system: corruption, loss, one reverse step."""
