"""What a recipe will take before it runs: parameters, tokens, FLOPs, memory, disk and time, a stage at a time.

Parameters come from the very model that would be built, on torch's meta device. FLOPs a token: 6 N + attention to train
(PaLM, appendix B), a third of it forward only. Time: FLOPs over what the stages of this store reached on this device,
else over what some steps of the model reach now, else over a share of a measured product of matrices. What a user's own
stage takes is not known, and so it is said.
"""
