"""The network and batch that the three programs of this folder train."""

VOCAB = 256  # the last token is the mask
MASK = VOCAB - 1
WIDTH = 384
LAYERS = 6
HEADS = 6
HEAD_DIM = WIDTH // HEADS
MLP = 1024
LENGTH = 256
BATCH = 16
EPS = 1e-6
THETA = 10_000.0
LEARNING_RATE = 3e-4
BETAS = (0.9, 0.99)
CLIP = 1.0
TIME_EPSILON = 1e-3
