"""`python -m pipeline`, which is what torchrun and `accelerate launch` are given."""

from pipeline.cli import main

main()
