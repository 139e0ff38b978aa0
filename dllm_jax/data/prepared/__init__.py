"""How a corpus becomes token records: a plan, its pieces, processes.

The corpus is cut into pieces by its files alone (`plan`); a piece is tokenised
by whoever comes to it (`piece`), in processes that know no jax (`workers`), and
what is there of it is told by the directory alone (`progress`). `duplicates`
says which documents were there before. `data.record` is how others call this.
"""
