"""The stages of the road, one file each, readable from top to bottom."""
