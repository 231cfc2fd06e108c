"""Text in, tokens and chat rows out: sources, formats, tokenizers, chat templates, shards, packing.

Nothing heavy is imported here; every module imports what it needs, and `sources` needs no torch.
"""
